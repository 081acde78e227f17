"""A branch that is computed in parts: rows of the feed-forward, groups of heads."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer.attention.modules import Attending, AttentionCall
from reformer.autocasting import Autocast
from reformer.branch import Branch, Gradients
from reformer.layer import Block
from reformer.stacks import run_stack
from tests.reformer.helpers import (
    BATCH,
    HEADS,
    SEQ,
    assert_all_close,
    integers,
    normal,
    small_config,
    small_model,
    small_tokens,
)
from tests.reformer.memory import allocations, tensor_bytes

OFF = Autocast("cpu", False, torch.bfloat16)
KINDS = ("lsh", "local", "full", "full_standard", "oracle")


def build(*, dtype: torch.dtype = torch.float64, **settings: Any) -> Block:
    torch.manual_seed(0)
    return Block(small_config(**settings), layer=0).to(dtype)


def branch_of(block: Block, name: str) -> Branch:
    return dict(zip(("attention", "feed_forward"), block.branches(), strict=True))[name]


def kept(branch: Branch, x: Tensor, gradient: Tensor, *, call: AttentionCall, buckets: Tensor | None) -> Any:
    """The output and all gradients, by autograd from activations that were kept."""
    leaf = x.detach().requires_grad_()
    out = branch(leaf, call=call, buckets=buckets).out
    return [out, *torch.autograd.grad(out, [leaf, *branch.trainable_parameters()], gradient)]


def flat(found: Gradients) -> list[Tensor]:
    assert found.stream is not None
    return [found.out, found.stream, *(each for each in found.parameters if each is not None)]


# Rows.


def gradients(block: Block, x: Tensor) -> list[Tensor]:
    out = block.feed(x)
    inputs = [x, *branch_of(block, "feed_forward").trainable_parameters()]
    return [out, *torch.autograd.grad(out, inputs, normal(*out.shape, seed=1))]


@pytest.mark.parametrize("length", [1, 5, 29, 31])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu", "geglu"])
def test_chunks_give_the_same_outputs_and_gradients(length: int, activation: str) -> None:
    x = normal(BATCH, SEQ, 14).requires_grad_()
    whole, chunked = (build(ff_chunk_length=each, activation=activation) for each in (None, length))
    expected = gradients(whole, x)
    assert_all_close(gradients(chunked, x), expected, tolerance=1e-12)
    found = branch_of(chunked, "feed_forward").vjp(
        x, normal(BATCH, SEQ, 14, seed=1), call=AttentionCall(), buckets=None, autocast=OFF
    )
    assert_all_close(flat(found), expected, tolerance=1e-12)


def chunk_by_chunk(block: Block, x: Tensor, *, length: int) -> Tensor:
    """What the branch computes in training, with nothing recomputed."""
    parts, module = [], block.feed_forward
    for rows in x.split(length, dim=1):
        normed = block.feed_forward_norm(rows)
        inner = F.dropout(F.gelu(normed @ module.wide.weight.T + module.wide.bias), block.dropout.p)
        parts.append(F.dropout(inner @ module.narrow.weight.T + module.narrow.bias, block.dropout.p))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("between", ["nothing", "other draws", "evaluation"])
def test_a_chunk_that_is_computed_again_drops_what_it_dropped(between: str) -> None:
    block, x = build(ff_chunk_length=5, dropout=0.5), normal(BATCH, SEQ, 14).requires_grad_()
    pull = normal(BATCH, SEQ, 14, seed=1)
    inputs = [x, *branch_of(block, "feed_forward").trainable_parameters()]
    torch.manual_seed(3)
    expected = chunk_by_chunk(block, x, length=5)
    place = torch.get_rng_state()
    torch.manual_seed(3)
    actual = block.feed(x)
    assert torch.equal(torch.get_rng_state(), place)
    if between == "other draws":
        torch.rand(17)
    if between == "evaluation":
        block.eval()
    place = torch.get_rng_state()
    found = torch.autograd.grad(actual, inputs, pull)
    assert torch.equal(torch.get_rng_state(), place)
    wanted = torch.autograd.grad(expected, inputs, pull)
    assert_all_close([actual, *found], [expected, *wanted], tolerance=1e-12)


@pytest.mark.parametrize("how", ["autograd", "vjp"])
def test_chunks_lower_the_training_peak_by_what_the_formula_says(how: str) -> None:
    seq, length, d_ff = 1024, 64, 509
    x = normal(BATCH, seq, 14, dtype=torch.float32).requires_grad_()

    def peak(ff_chunk_length: int | None) -> int:
        block = build(dtype=torch.float32, ff_chunk_length=ff_chunk_length, d_ff=d_ff)
        branch = branch_of(block, "feed_forward")
        if how == "autograd":
            return allocations(lambda: block.feed(x).sum().backward()).peak
        return allocations(lambda: branch.vjp(x, x, call=AttentionCall(), buckets=None, autocast=OFF)).peak

    # Both wide activations of a row and the gradient of one, held for all rows or for one chunk.
    predicted = 3 * (tensor_bytes(BATCH, seq, d_ff) - tensor_bytes(BATCH, length, d_ff))
    assert peak(None) - peak(length) >= 0.8 * predicted
    assert peak(length) < tensor_bytes(BATCH, seq, d_ff) / 2


def test_gradients_of_chunks_are_added_up_in_the_type_of_the_weights() -> None:
    """Under autocast a weight is cast once a chunk, so that no sum over chunks is rounded to bfloat16."""
    block, x = build(dtype=torch.float32, ff_chunk_length=1), normal(1, SEQ, 14, dtype=torch.float32)
    whole = build(dtype=torch.float32)
    pull = normal(1, SEQ, 14, seed=1, dtype=torch.float32)

    def gradient(block: Block) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = block.feed(x)
        return torch.autograd.grad(out, block.feed_forward.narrow.bias, pull.to(out.dtype))[0]

    exact = pull.bfloat16().double().sum(dim=(0, 1))
    assert_all_close([gradient(block)], [exact], tolerance=1e-5)
    assert not torch.allclose(gradient(whole).double(), exact, rtol=0, atol=1e-5)


# Heads.


@contextmanager
def all_heads(block: Block) -> Iterator[None]:
    """The same block, all of its heads at once."""
    before, block.heads_at_once = block.heads_at_once, None
    try:
        yield
    finally:
        block.heads_at_once = before


CALLS: Mapping[str, Callable[[], AttentionCall]] = {
    "plain": AttentionCall,
    "padding": lambda: AttentionCall(padding_mask=integers(5, BATCH, SEQ, seed=3) > 0),
    "other rounds": lambda: AttentionCall(attending=Attending(n_hashes=2, hash_seed=7), draw=3),
    "random buckets": lambda: AttentionCall(attending=Attending(kind="random")),
    "as if full": lambda: AttentionCall(attending=Attending(kind="full")),
}


@pytest.mark.parametrize("heads_at_once", [1, 2])
@pytest.mark.parametrize("given", CALLS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_groups_of_heads_give_the_same_outputs_and_gradients(
    heads_at_once: int, given: str, kind: str, positions: str
) -> None:
    settings = {"layers": (kind,), "positions": positions, "heads_at_once": heads_at_once, "d_head": 12}
    block, call, x = build(**settings), CALLS[given](), normal(BATCH, SEQ, 14)
    pull = normal(BATCH, SEQ, 14, seed=1)
    with torch.no_grad():
        out, buckets = block.attend(x, call=call)
    with all_heads(block):
        whole = branch_of(block, "attention")
        expected = kept(whole, x, pull, call=call, buckets=None)
        with torch.no_grad():
            assert (buckets is None) == (whole(x, call=call).buckets is None)
            if buckets is not None:
                assert torch.equal(buckets, whole(x, call=call).buckets)
    found = branch_of(block, "attention").vjp(x, pull, call=call, buckets=buckets, autocast=OFF)
    assert torch.equal(found.out, out)
    assert_all_close(flat(found), expected, tolerance=1e-12)


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_group_may_be_smaller_than_the_others_and_blocks_of_rows_too(
    norm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reformer.attention.head_groups.ROWS", 11)
    block, x, pull = build(norm=norm, heads_at_once=2), normal(BATCH, SEQ, 14), normal(BATCH, SEQ, 14, seed=1)
    assert block.attention.config.n_heads == HEADS == 3
    with torch.no_grad():
        buckets = block.attend(x, call=AttentionCall()).buckets
    with all_heads(block):
        whole = branch_of(block, "attention")
        expected = kept(whole, x, pull, call=AttentionCall(), buckets=buckets)
    found = branch_of(block, "attention").vjp(x, pull, call=AttentionCall(), buckets=buckets, autocast=OFF)
    assert_all_close(flat(found), expected, tolerance=1e-12)


@pytest.mark.parametrize("frozen", ["attention_norm", "attention.query_key", "attention"])
def test_what_is_frozen_gets_no_gradient_and_takes_none_from_others(frozen: str) -> None:
    block, x, pull = build(heads_at_once=1), normal(BATCH, SEQ, 14), normal(BATCH, SEQ, 14, seed=1)
    block.get_submodule(frozen).requires_grad_(False)
    with torch.no_grad():
        buckets = block.attend(x, call=AttentionCall()).buckets
    with all_heads(block):
        expected = kept(branch_of(block, "attention"), x, pull, call=AttentionCall(), buckets=buckets)
    found = branch_of(block, "attention").vjp(x, pull, call=AttentionCall(), buckets=buckets, autocast=OFF)
    assert_all_close(flat(found), expected, tolerance=1e-12)


def test_a_group_drops_the_same_again() -> None:
    block = build(heads_at_once=1, dropout=0.5, attention_dropout=0.25)
    x, pull = normal(BATCH, SEQ, 14), normal(BATCH, SEQ, 14, seed=1)
    torch.manual_seed(3)
    with torch.no_grad():
        out, buckets = block.attend(x, call=AttentionCall())
    place = torch.get_rng_state()
    torch.manual_seed(3)
    found = branch_of(block, "attention").vjp(x, pull, call=AttentionCall(), buckets=buckets, autocast=OFF)
    assert torch.equal(torch.get_rng_state(), place)
    assert torch.equal(found.out, out)
    assert 0.4 < float((out == 0).double().mean()) < 0.6

    # The gradient is that of the same dropped function: along a direction, its slope.
    direction = normal(BATCH, SEQ, 14, seed=5)

    def along(step: float) -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            return (
                block.attend(x + step * direction, call=AttentionCall(), buckets=buckets).out * pull
            ).sum()

    slope = (along(1e-6) - along(-1e-6)) / 2e-6
    assert found.stream is not None
    assert float((found.stream * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


@pytest.mark.parametrize("residual", ["reversible", "reversible_exact"])
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.25, "attention_dropout": 0.25}], ids=["", "dropout"])
def test_models_in_parts_are_reversible(residual: str, settings: dict[str, Any]) -> None:
    parts = {"heads_at_once": 2, "ff_chunk_length": 5, "loss_chunk_length": 7}
    model = small_model(layers=KINDS, n_layers=5, residual=residual, **parts, **settings)
    errors = model.reconstruction_errors(small_tokens())
    cosine = model.gradient_cosine(small_tokens(), small_tokens(seed=1))
    assert float(errors.max()) == 0 if residual == "reversible_exact" else float(errors.max()) < 1e-12
    # With dropout, heads together and in groups draw differently.
    assert bool(settings) or float(cosine) == pytest.approx(1, abs=1e-9 if residual == "reversible" else 1e-4)


def test_a_model_in_parts_writes_what_the_whole_one_writes() -> None:
    models = [small_model(max_length=2 * SEQ, **parts).eval() for parts in ({}, {"heads_at_once": 1})]
    models[1].load_state_dict(models[0].state_dict())
    whole, parts = (model.generate(small_tokens(), max_new_tokens=11) for model in models)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_groups_stay_near_all_heads(dtype: torch.dtype) -> None:
    block = build(dtype=torch.float32, heads_at_once=1)
    x, pull = (normal(BATCH, SEQ, 14, seed=seed, dtype=torch.float32) for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        with torch.no_grad():
            buckets = block.attend(x, call=AttentionCall()).buckets
        found = branch_of(block, "attention").vjp(
            x, pull, call=AttentionCall(), buckets=buckets, autocast=OFF
        )
        with all_heads(block):
            whole = branch_of(block, "attention").vjp(
                x, pull, call=AttentionCall(), buckets=buckets, autocast=OFF
            )
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert_all_close(flat(found), flat(whole), tolerance=tolerance)


def test_groups_hold_what_a_group_needs_and_a_few_streams() -> None:
    seq, heads, dim, width = 2048, 8, 32, 64
    settings = {"d_model": width, "n_heads": heads, "d_head": dim, "max_length": seq, "chunk_length": 64}
    x = normal(1, seq, width, dtype=torch.float32)
    stream, head = tensor_bytes(1, seq, width), tensor_bytes(1, seq, dim)

    def peak(heads_at_once: int | None) -> int:
        block = build(dtype=torch.float32, n_buckets=64, n_hashes=1, heads_at_once=heads_at_once, **settings)
        with torch.no_grad():
            buckets = block.attend(x, call=AttentionCall()).buckets
        branch = branch_of(block, "attention")
        return allocations(lambda: branch.vjp(x, x, call=AttentionCall(), buckets=buckets, autocast=OFF)).peak

    # Outputs and gradients; of a head what it projects, its output, their gradients, and the kernel's own.
    assert peak(1) < 3 * stream + 14 * head
    assert peak(None) > 6 * heads * head


def test_the_streams_of_a_long_stack_and_their_gradients_are_all_that_is_held() -> None:
    """Both streams, both gradients, and the 4.6 streams that this attention needs: nothing a layer."""
    seq, width = 4096, 32
    stream = tensor_bytes(1, seq, width)
    settings = {"d_model": width, "d_ff": width, "n_heads": 4, "d_head": 8, "max_length": seq}
    x = normal(1, seq, width, dtype=torch.float32)

    def peak(n_layers: int) -> int:
        torch.manual_seed(0)
        config = small_config(
            **settings, n_buckets=64, chunk_length=64, n_hashes=1, heads_at_once=1, ff_chunk_length=256
        )
        blocks = [Block(config, layer=layer) for layer in range(n_layers)]
        call = AttentionCall()

        def step() -> None:
            y1, y2 = run_stack(blocks, x, call=call, residual="reversible", grid_bits=16)
            total = (y1 * x).sum() + (y2 * x).sum()
            del y1, y2
            total.backward()

        return allocations(step).peak

    order = 4 * seq * 4
    assert peak(2) < (4 + 4.6) * stream + 2 * order
    assert peak(9) - peak(2) < 7 * (order + 2 * 4 * (4 * width * width + 2 * width * width)) + 2**16


def test_knocked_out_layers_give_nothing_in_groups_too() -> None:
    block, x = build(heads_at_once=1), normal(BATCH, SEQ, 14)
    call = AttentionCall(attending=Attending(kind="knock_out"))
    found = branch_of(block, "attention").vjp(x, x, call=call, buckets=None, autocast=OFF)
    assert (found.out == 0).all()
    assert found.stream is None
    assert not any(isinstance(each, nn.Parameter) for each in found.parameters)
