from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import (
    CrossPolytope,
    Hyperplane,
    Random,
    full_attention,
    full_standard_attention,
    local_attention,
    lsh_attention,
)
from reformer.attention.modules import (
    Attended,
    Attending,
    AttentionCall,
    SharedQueryKeyAttention,
    StandardAttention,
    build_attention,
    merge_heads,
    split_heads,
)
from reformer.randomness import generator
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal, small_config

WIDTH = 14
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
    return torch.stack(x.split(5, dim=-1), dim=1)


def rows(x: Tensor) -> Tensor:
    return torch.cat(x.unbind(dim=1), dim=-1)


def test_heads_are_cut_from_the_width_in_order() -> None:
    x = normal(BATCH, SEQ, 10)
    assert torch.equal(split_heads(x, heads=2), heads(x))
    assert torch.equal(merge_heads(heads(x)), x)


def test_a_shared_layer_is_lsh_attention_between_its_projections() -> None:
    module = build()
    assert isinstance(module, SharedQueryKeyAttention)
    x = some_input()
    out, buckets = call(module)
    assert buckets is not None
    assert (buckets.dtype, buckets.shape) == (torch.int32, (BATCH, 2, 2, SEQ))
    qk, v = heads(x @ module.query_key.weight.T), heads(x @ module.value.weight.T)
    settings: dict[str, Any] = {"n_hashes": 2, "chunk_length": 7}
    expected = lsh_attention(qk, v, n_buckets=4, generator=generator(0, LAYER, 0), **settings)
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
    module = build(layers=("local",), chunk_length=7)
    assert isinstance(module, StandardAttention)
    x = some_input()
    q, k, v = (heads(x @ p.weight.T) for p in (module.query, module.key, module.value))
    expected = rows(local_attention(q, k, v, chunk_length=7)) @ module.output.weight.T
    assert_all_close([call(module).out], [expected], tolerance=1e-12)


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
    given = torch.zeros(BATCH, 2, 2, SEQ, dtype=torch.int32)
    attended = module(some_input(), call=AttentionCall(), buckets=given)
    assert attended.buckets is given
    assert not torch.allclose(attended.out, own.out)
    again = module(some_input(), call=AttentionCall(draw=99), buckets=own.buckets)
    assert torch.equal(again.out, own.out)


@pytest.mark.parametrize("kind", ["lsh", "full", "local", "full_standard"])
def test_attention_dropout_is_of_training_alone(kind: str) -> None:
    module = build(layers=(kind,), attention_dropout=0.5).eval()
    x = some_input()
    assert torch.equal(module(x, call=AttentionCall()).out, module(x, call=AttentionCall()).out)
    module.train()
    assert not torch.equal(module(x, call=AttentionCall()).out, module(x, call=AttentionCall()).out)


@pytest.mark.parametrize("kind", ["lsh", "full", "local", "full_standard"])
@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0)])
def test_an_empty_input_gives_an_empty_output(kind: str, batch: int, seq: int) -> None:
    module = build(layers=(kind,))
    x = torch.empty(batch, seq, WIDTH, dtype=torch.float64)
    assert module(x, call=AttentionCall()).out.shape == (batch, seq, WIDTH)


@pytest.mark.parametrize("kind", ["lsh", "full", "local", "full_standard"])
@pytest.mark.parametrize("shape", [(1, SEQ), (BATCH, SEQ - 1)])
def test_a_padding_mask_that_does_not_fit_is_a_value_error(
    kind: str, shape: tuple[int, ...], unchecked: None
) -> None:
    module = build(layers=(kind,))
    with pytest.raises(ValueError, match=r"padding_mask of shape .*: give bool \[batch, seq\] = \(2, 29\)"):
        module(some_input(), call=AttentionCall(padding_mask=torch.ones(shape, dtype=torch.bool)))


def test_an_unknown_kind_is_a_value_error_that_names_the_kinds() -> None:
    with pytest.raises(ValueError, match="kind='local': use one of lsh, full, random, knock_out"):
        Attending(kind="local")
