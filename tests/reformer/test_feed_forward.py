from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reformer.feed_forward import FeedForward
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal, small_config
from tests.reformer.memory import allocations, tensor_bytes


def build(length: int | None, *, dtype: torch.dtype = torch.float64, **settings: Any) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(small_config(ff_chunk_length=length, **settings)).to(dtype)


def test_it_is_two_linear_layers_around_a_gelu() -> None:
    module, x = build(None), normal(BATCH, SEQ, 14)
    wide = x @ module.wide.weight.T + module.wide.bias
    expected = 0.5 * wide * (1 + torch.erf(wide / 2**0.5)) @ module.narrow.weight.T + module.narrow.bias
    assert_all_close([module(x)], [expected], tolerance=1e-12)
    assert wide.shape[-1] == 17


def test_a_relu_takes_the_place_of_the_gelu() -> None:
    module, x = build(None, activation="relu"), normal(BATCH, SEQ, 14)
    inner = (x @ module.wide.weight.T + module.wide.bias).clamp(min=0)
    assert_all_close([module(x)], [inner @ module.narrow.weight.T + module.narrow.bias], tolerance=1e-12)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("swiglu", lambda x: x * torch.sigmoid(x)),
        ("geglu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    ],
)
def test_gated_layers_multiply_by_a_projection_of_their_own(
    activation: str, function: Callable[[Tensor], Tensor]
) -> None:
    module, x = build(None, activation=activation), normal(BATCH, SEQ, 14)
    gate = x @ module.wide.weight[:17].T + module.wide.bias[:17]
    value = x @ module.wide.weight[17:].T + module.wide.bias[17:]
    expected = (function(gate) * value) @ module.narrow.weight.T + module.narrow.bias
    assert_all_close([module(x)], [expected], tolerance=1e-12)
    assert module.wide.weight.shape == (34, 14)


def gradients(module: FeedForward, x: Tensor) -> list[Tensor]:
    out = module(x)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], normal(*out.shape, seed=1))]


@pytest.mark.parametrize("length", [1, 5, 29, 31])
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu", "geglu"])
def test_chunks_give_the_same_outputs_and_gradients(length: int, activation: str) -> None:
    x = normal(BATCH, SEQ, 14).requires_grad_()
    whole, chunked = (build(each, activation=activation) for each in (None, length))
    assert_all_close(gradients(chunked, x), gradients(whole, x), tolerance=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dropout_falls_on_the_wide_activations_in_training_alone(activation: str) -> None:
    module, x = build(None, dropout=0.25, activation=activation), normal(BATCH, SEQ, 14)
    torch.nn.init.eye_(module.narrow.weight)
    torch.nn.init.zeros_(module.narrow.bias)
    torch.manual_seed(3)
    dropped = module(x)
    module.eval()
    whole = module(x)
    # The narrow layer hands on the first 14 of 17 as they are.
    kept = dropped != 0
    assert 0.7 < float(kept.double().mean()) < 0.8
    assert_all_close([dropped[kept]], [whole[kept] / 0.75], tolerance=1e-12)
    assert (whole != 0).all()


def chunk_by_chunk(module: FeedForward, x: Tensor, *, length: int) -> Tensor:
    """What the module computes in training, with nothing recomputed."""
    parts = []
    for rows in x.split(length, dim=1):
        inner = F.dropout(F.gelu(rows @ module.wide.weight.T + module.wide.bias), module.dropout.p)
        parts.append(inner @ module.narrow.weight.T + module.narrow.bias)
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("between", ["nothing", "other draws", "evaluation"])
def test_a_chunk_that_is_computed_again_drops_what_it_dropped(between: str) -> None:
    module, x = build(5, dropout=0.5), normal(BATCH, SEQ, 14).requires_grad_()
    pull = normal(BATCH, SEQ, 14, seed=1)
    inputs = [x, *module.parameters()]
    torch.manual_seed(3)
    expected = chunk_by_chunk(module, x, length=5)
    place = torch.get_rng_state()
    torch.manual_seed(3)
    actual = module(x)
    assert torch.equal(torch.get_rng_state(), place)
    if between == "other draws":
        torch.rand(17)
    if between == "evaluation":
        module.eval()
    place = torch.get_rng_state()
    found = torch.autograd.grad(actual, inputs, pull)
    assert torch.equal(torch.get_rng_state(), place)
    wanted = torch.autograd.grad(expected, inputs, pull)
    assert_all_close([actual, *found], [expected, *wanted], tolerance=1e-12)


def test_chunks_lower_the_training_peak_by_what_the_formula_says() -> None:
    seq, length, d_ff = 1024, 64, 509
    x = normal(BATCH, seq, 14, dtype=torch.float32).requires_grad_()

    def peak(ff_chunk_length: int | None) -> int:
        module = build(ff_chunk_length, dtype=torch.float32, d_ff=d_ff)
        return allocations(lambda: module(x).sum().backward()).peak

    # Both wide activations of a row and the gradient of one, held for all rows or for one chunk.
    predicted = 3 * (tensor_bytes(BATCH, seq, d_ff) - tensor_bytes(BATCH, length, d_ff))
    assert peak(None) - peak(length) >= 0.8 * predicted
    assert peak(length) < tensor_bytes(BATCH, seq, d_ff) / 2
