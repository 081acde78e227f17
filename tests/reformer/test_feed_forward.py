import pytest
import torch
from torch import Tensor

from reformer.feed_forward import FeedForward
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal, small_config
from tests.reformer.memory import allocations, tensor_bytes


def build(length: int | None, *, dtype: torch.dtype = torch.float64, **settings: int) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(small_config(ff_chunk_length=length, **settings)).to(dtype)


def test_it_is_two_linear_layers_around_a_gelu() -> None:
    module, x = build(None), normal(BATCH, SEQ, 14)
    wide = x @ module.wide.weight.T + module.wide.bias
    expected = 0.5 * wide * (1 + torch.erf(wide / 2**0.5)) @ module.narrow.weight.T + module.narrow.bias
    assert_all_close([module(x)], [expected], tolerance=1e-12)
    assert wide.shape[-1] == 17


def gradients(module: FeedForward, x: Tensor) -> list[Tensor]:
    out = module(x)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], normal(*out.shape, seed=1))]


@pytest.mark.parametrize("length", [1, 5, 29, 31])
def test_chunks_give_the_same_outputs_and_gradients(length: int) -> None:
    x = normal(BATCH, SEQ, 14).requires_grad_()
    assert_all_close(gradients(build(length), x), gradients(build(None), x), tolerance=1e-12)


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
