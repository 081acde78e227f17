from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import (
    CrossPolytope,
    Hyperplane,
    Random,
    cross_attention,
    full_attention,
    full_standard_attention,
    local_attention,
    lsh_attention,
    oracle_attention,
)
from reformer.attention import reference
from reformer.attention.modules import (
    Attended,
    Attending,
    AttentionCall,
    CrossAttention,
    SharedQueryKeyAttention,
    StandardAttention,
    build_attention,
    merge_heads,
    split_heads,
)
from reformer.attention.rotary import rotate
from reformer.config import ATTENTION_KINDS
from reformer.randomness import dropout, generator
from tests.reformer.helpers import BATCH, HEADS, SEQ, assert_all_close, normal, small_config

WIDTH, D_HEAD = 14, 11
LAYER = 2


def build(**settings: Any) -> SharedQueryKeyAttention | StandardAttention:
    torch.manual_seed(0)
    return build_attention(small_config(**settings), layer=LAYER).double()


def some_input() -> Tensor:
    return normal(BATCH, SEQ, WIDTH)


def call(module: SharedQueryKeyAttention | StandardAttention, **attending: Any) -> Attended:
    attended = module(some_input(), call=AttentionCall(attending=Attending(**attending)))
    assert isinstance(attended, Attended)
    return attended


def heads(x: Tensor) -> Tensor:
    return torch.stack(x.split(D_HEAD, dim=-1), dim=1)


def rows(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(dim=1), dim=-1)


def test_heads_are_cut_from_the_width_in_order() -> None:
    x = normal(BATCH, SEQ, HEADS * D_HEAD)
    assert torch.equal(split_heads(x, heads=HEADS), heads(x))
    assert torch.equal(merge_heads(heads(x)), x)


def test_a_shared_layer_is_lsh_attention_between_its_projections() -> None:
    module = build()
    assert isinstance(module, SharedQueryKeyAttention)
    x = some_input()
    out, buckets = call(module)
    assert buckets is not None
    assert (buckets.dtype, buckets.shape) == (torch.int32, (BATCH, HEADS, 5, SEQ))
    qk, v = heads(x @ module.query_key.weight.T), heads(x @ module.value.weight.T)
    settings: dict[str, Any] = {"n_hashes": 5, "chunk_length": 9}
    expected = lsh_attention(qk, v, n_buckets=8, generator=generator(0, LAYER, 0), **settings)
    assert_all_close([out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)
    assert torch.equal(lsh_attention(qk, v, buckets=buckets, **settings), expected)


def test_as_full_the_same_weights_give_full_attention() -> None:
    module = build()
    assert isinstance(module, SharedQueryKeyAttention)
    x = some_input()
    expected = full_attention(heads(x @ module.query_key.weight.T), heads(x @ module.value.weight.T))
    full = call(module, kind="full")
    assert_all_close([full.out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)
    assert full.buckets is None
    assert not torch.allclose(full.out, call(module).out)


def test_as_oracle_a_query_sees_as_many_keys_as_the_rounds_could_show() -> None:
    module = build(n_hashes=1, chunk_length=3)
    assert isinstance(module, SharedQueryKeyAttention)
    x = some_input()
    qk, v = heads(x @ module.query_key.weight.T), heads(x @ module.value.weight.T)
    for n_hashes in (1, 2):
        attended = call(module, kind="oracle", n_hashes=n_hashes)
        expected = oracle_attention(qk, v, n_keys=3 * n_hashes)
        assert_all_close([attended.out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)
        assert attended.buckets is None
    built = build(layers=("oracle",), n_hashes=1, chunk_length=3)
    built.load_state_dict(module.state_dict())
    assert torch.equal(call(built).out, call(module, kind="oracle").out)


def lsh_twin(qk: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return reference.lsh_attention(qk, v, n_hashes=5, chunk_length=4, **settings)


def local_twin(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    return reference.local_attention(q, k, v, chunk_length=4, **settings)


#: Of each case the settings of the layer, its dense twin, and the settings of that.
BIDIRECTIONAL: dict[str, tuple[dict[str, Any], Callable[..., Tensor], dict[str, Any]]] = {
    "lsh": ({"layers": ("lsh",)}, lsh_twin, {}),
    "lsh, published": ({"layers": ("lsh",), "causality": "published"}, lsh_twin, {}),
    "lsh, own bucket": ({"layers": ("lsh",), "bucket_mask": True}, lsh_twin, {"bucket_mask": True}),
    "lsh, no look-ahead": ({"layers": ("lsh",), "n_chunks_after": 0}, lsh_twin, {"n_chunks_after": 0}),
    "full": ({"layers": ("full",)}, reference.full_attention, {}),
    # Two rounds, each of one chunk before and one after.
    "oracle": ({"layers": ("oracle",), "n_hashes": 2}, reference.oracle_attention, {"n_keys": 2 * 2 * 4}),
    "local": ({"layers": ("local",)}, local_twin, {}),
    "local, two after": (
        {"layers": ("local",), "local_n_chunks_before": 0, "local_n_chunks_after": 2},
        local_twin,
        {"n_chunks_before": 0, "n_chunks_after": 2},
    ),
    "full_standard": (
        {"layers": ("full_standard",)},
        local_twin,
        {"n_chunks_before": SEQ, "n_chunks_after": SEQ},
    ),
}


@pytest.mark.parametrize("padding_mask", [None, normal(BATCH, SEQ, seed=5) > -0.5], ids=["whole", "padded"])
@pytest.mark.parametrize("case", BIDIRECTIONAL)
def test_bidirectional_layers_equal_the_dense_twins(case: str, padding_mask: Tensor | None) -> None:
    settings, twin, same_settings = BIDIRECTIONAL[case]
    module = build(causal=False, chunk_length=4, **settings)
    x, attended = some_input(), AttentionCall(padding_mask=padding_mask)
    out, buckets = module(x, call=attended)
    if buckets is not None:
        same_settings = same_settings | {"buckets": buckets}
    expected = twin(*module.project(x), causal=False, padding_mask=padding_mask, **same_settings)
    assert_all_close([out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)
    causal = build(causal=True, chunk_length=4, **(settings | {"n_chunks_after": 0}))
    assert not torch.allclose(causal(x, call=attended).out, out)


@pytest.mark.parametrize("kind", ["lsh", "full", "oracle", "local", "full_standard"])
def test_rotary_positions_turn_queries_and_keys_but_no_values(kind: str) -> None:
    module = build(layers=(kind,), positions="rotary", d_head=6)
    plain = build(layers=(kind,), d_head=6)
    x = some_input()
    *turned, v = module.project(x)
    *unturned, same = plain.project(x)
    assert torch.equal(v, same)
    assert_all_close(turned, [rotate(vectors) for vectors in unturned], tolerance=1e-14)
    positions = torch.arange(3, 3 + SEQ).expand(BATCH, SEQ)
    further = module.project(x, positions=positions)
    assert_all_close(further[:-1], [rotate(each, positions=positions) for each in unturned], tolerance=1e-14)
    assert not torch.allclose(call(module).out, call(plain).out)


def test_hashing_sees_what_rotary_positions_turned() -> None:
    module = build(positions="rotary", d_head=6)
    assert isinstance(module, SharedQueryKeyAttention)
    qk, v = module.project(some_input())
    out, buckets = call(module)
    expected = lsh_attention(qk, v, n_hashes=5, chunk_length=9, n_buckets=8, generator=generator(0, LAYER, 0))
    assert_all_close([out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)
    assert not torch.equal(buckets_of(build(d_head=6)), buckets)


def test_hash_dropout_falls_on_what_is_hashed_and_on_nothing_else() -> None:
    module = build(hash_dropout=0.5)
    assert isinstance(module, SharedQueryKeyAttention)
    whole = build()
    before = torch.get_rng_state()
    out, buckets = call(module)
    assert torch.equal(torch.get_rng_state(), before)
    qk, _ = module.project(some_input())
    dropped = dropout(qk.detach(), 0.5, generator=generator(0, LAYER, 0, 1))
    expected = CrossPolytope()(dropped, n_hashes=5, n_buckets=8, generator=generator(0, LAYER, 0))
    assert torch.equal(buckets, expected)
    assert 0.1 < float((buckets_of(whole) != buckets).double().mean()) < 0.9
    # Attention itself is that of the same buckets without any dropout.
    assert torch.equal(whole(some_input(), call=AttentionCall(), buckets=buckets).out, out)


def test_hash_dropout_is_of_training_alone_and_new_with_every_draw() -> None:
    module, whole = build(hash_dropout=0.5), build()
    x = some_input()
    first = module(x, call=AttentionCall(draw=1)).buckets
    assert torch.equal(module(x, call=AttentionCall(draw=1)).buckets, first)
    one, other = (
        (module(x, call=AttentionCall(draw=draw)).buckets != whole(x, call=AttentionCall(draw=draw)).buckets)
        for draw in (1, 2)
    )
    assert not torch.equal(one, other)
    module.eval()
    assert torch.equal(module(x, call=AttentionCall(draw=1)).buckets, buckets_at(whole, draw=1))


def buckets_at(module: SharedQueryKeyAttention | StandardAttention, *, draw: int) -> Tensor | None:
    buckets: Tensor | None = module(some_input(), call=AttentionCall(draw=draw)).buckets
    return buckets


def test_cross_attention_takes_queries_from_the_tokens_and_the_rest_from_the_source() -> None:
    module = CrossAttention(small_config(positions="rotary", d_head=6), layer=LAYER, source_width=13).double()
    x, source = some_input(), normal(BATCH, 19, 13, seed=3)
    real = normal(BATCH, 19, seed=5) > -0.5
    out = module(x, call=AttentionCall(source=source, source_padding_mask=real))
    q = torch.stack((x @ module.query.weight.T).split(6, dim=-1), dim=1)
    k, v = (torch.stack((source @ p.weight.T).split(6, dim=-1), dim=1) for p in (module.key, module.value))
    expected = cross_attention(q, k, v, padding_mask=real)
    assert_all_close([out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)


def test_cross_attention_without_a_source_is_a_value_error() -> None:
    module = CrossAttention(small_config(), layer=LAYER, source_width=13).double()
    with pytest.raises(ValueError, match="source=None: cross-attention looks at a second sequence"):
        module(some_input(), call=AttentionCall())


@pytest.mark.parametrize("kind", ["local", "full_standard"])
def test_standard_layers_have_queries_keys_and_values_of_their_own(kind: str) -> None:
    module = build(layers=("lsh", "lsh", kind), local_chunk_length=5, local_n_chunks_before=2)
    assert isinstance(module, StandardAttention)
    x = some_input()
    q, k, v = (heads(x @ p.weight.T) for p in (module.query, module.key, module.value))
    expected = (
        local_attention(q, k, v, chunk_length=5, n_chunks_before=2)
        if kind == "local"
        else full_standard_attention(q, k, v)
    )
    out, buckets = call(module)
    assert_all_close([out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)
    assert buckets is None


def test_local_layers_use_the_chunk_length_of_lsh_unless_they_have_one() -> None:
    module = build(layers=("local",))
    assert isinstance(module, StandardAttention)
    x = some_input()
    q, k, v = (heads(x @ p.weight.T) for p in (module.query, module.key, module.value))
    expected = rows(local_attention(q, k, v, chunk_length=9)) @ module.output.weight.T
    assert_all_close([call(module).out], [expected], tolerance=1e-12)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"attention_dropout": 0.25}, 0.25),
        ({"local_attention_dropout": 0.25}, 0.25),
        ({"attention_dropout": 0.5, "local_attention_dropout": 0.25}, 0.25),
        ({"attention_dropout": 0.5, "local_attention_dropout": 0.0}, 0.0),
    ],
    ids=str,
)
def test_local_layers_have_a_share_of_dropout_of_their_own_if_one_is_given(
    settings: dict[str, Any], share: float
) -> None:
    module = build(layers=("local",), **settings)
    torch.manual_seed(5)
    out = call(module).out
    torch.manual_seed(5)
    expected = local_attention(*module.project(some_input()), chunk_length=9, dropout_p=share)
    assert_all_close([out], [rows(expected) @ module.output.weight.T], tolerance=1e-12)
    whole = local_attention(*module.project(some_input()), chunk_length=9)
    assert torch.allclose(whole, expected) == (share == 0)


@pytest.mark.parametrize("kind", [kind for kind in ATTENTION_KINDS if kind != "local"])
def test_the_share_of_local_layers_is_of_local_layers_alone(kind: str) -> None:
    dropped, whole = (build(layers=(kind,), local_attention_dropout=share) for share in (0.5, None))
    assert torch.equal(call(dropped).out, call(whole).out)


def test_a_knocked_out_layer_gives_zeros() -> None:
    out, buckets = call(build(), kind="knock_out")
    assert (out == 0).all()
    assert out.shape == (BATCH, SEQ, WIDTH)
    assert buckets is None


def buckets_of(module: SharedQueryKeyAttention | StandardAttention, **attending: Any) -> Tensor:
    buckets = call(module, **attending).buckets
    assert buckets is not None
    return buckets


def test_as_random_the_buckets_know_nothing_of_the_input() -> None:
    module = build()
    attended = AttentionCall(attending=Attending(kind="random"))
    first = buckets_of(module, kind="random")
    assert torch.equal(module(-3 * some_input().roll(1, dims=1), call=attended).buckets, first)
    assert torch.equal(buckets_of(build(hashing=Random())), first)
    assert not torch.equal(buckets_of(module), first)


def test_rounds_family_and_seed_can_be_changed_at_the_call() -> None:
    module = build()
    base = buckets_of(module)
    assert buckets_of(module, n_hashes=3).shape[2] == 3
    for changed in (buckets_of(module, hashing=Hyperplane()), buckets_of(module, hash_seed=1)):
        assert changed.shape == base.shape
        assert not torch.equal(changed, base)
    assert torch.equal(buckets_of(build(hash_seed=1, hashing=CrossPolytope()), hash_seed=0), base)


def test_draws_and_layers_have_rotations_of_their_own() -> None:
    module = build()
    other_layer = build_attention(small_config(), layer=LAYER + 1).double()
    other_layer.load_state_dict(module.state_dict())
    x = some_input()
    base = module(x, call=AttentionCall(draw=0)).buckets
    assert torch.equal(module(x, call=AttentionCall(draw=0)).buckets, base)
    assert not torch.equal(module(x, call=AttentionCall(draw=1)).buckets, base)
    assert not torch.equal(other_layer(x, call=AttentionCall(draw=0)).buckets, base)


def test_given_buckets_are_used_and_handed_on() -> None:
    module = build()
    own = call(module)
    given = torch.zeros(BATCH, HEADS, 5, SEQ, dtype=torch.int32)
    attended = module(some_input(), call=AttentionCall(), buckets=given)
    assert attended.buckets is given
    assert not torch.allclose(attended.out, own.out)
    again = module(some_input(), call=AttentionCall(draw=99), buckets=own.buckets)
    assert torch.equal(again.out, own.out)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_attention_dropout_is_of_training_alone(kind: str) -> None:
    module = build(layers=(kind,), attention_dropout=0.5).eval()
    x = some_input()
    assert torch.equal(module(x, call=AttentionCall()).out, module(x, call=AttentionCall()).out)
    module.train()
    assert not torch.equal(module(x, call=AttentionCall()).out, module(x, call=AttentionCall()).out)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0)])
def test_an_empty_input_gives_an_empty_output(kind: str, batch: int, seq: int) -> None:
    module = build(layers=(kind,))
    x = torch.empty(batch, seq, WIDTH, dtype=torch.float64)
    assert module(x, call=AttentionCall()).out.shape == (batch, seq, WIDTH)


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("shape", [(1, SEQ), (BATCH, SEQ - 1)])
def test_a_padding_mask_that_does_not_fit_is_a_value_error(
    kind: str, shape: tuple[int, ...], unchecked: None
) -> None:
    module = build(layers=(kind,))
    with pytest.raises(ValueError, match=r"padding_mask of shape .*: give bool \[batch, seq\] = \(2, 29\)"):
        module(some_input(), call=AttentionCall(padding_mask=torch.ones(shape, dtype=torch.bool)))


def test_so_it_is_where_rotations_are_made_of_the_real_tokens(unchecked: None) -> None:
    module = build(hashing=CrossPolytope(data_rotation=True), causality="published")
    with pytest.raises(ValueError, match=r"padding_mask of shape \(1, 29\) .*: give bool \[batch, seq\]"):
        module(some_input(), call=AttentionCall(padding_mask=torch.ones(1, SEQ, dtype=torch.bool)))


def test_an_unknown_kind_is_a_value_error_that_names_the_kinds() -> None:
    with pytest.raises(ValueError, match="kind='local': use one of lsh, full, oracle, random, knock_out"):
        Attending(kind="local")
