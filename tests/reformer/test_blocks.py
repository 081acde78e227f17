import pytest
import torch
from torch import Tensor, nn

from reformer.blocks import map_blocks, sum_blocks
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, integers, normal
from tests.reformer.memory import allocations, tensor_bytes

LENGTHS = (None, 1, 5, 28, 29, 31)


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 13), nn.GELU(), nn.Linear(13, 11)).double()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_row_wise_function_gives_the_same_block_by_block(length: int | None) -> None:
    module, x = layer(), normal(BATCH, SEQ, 7).requires_grad_()
    whole, blocks = module(x), map_blocks(module, x, length=length)
    parameters = [x, *module.parameters()]
    pull = normal(*whole.shape, seed=1)
    assert_all_close(
        [blocks, *torch.autograd.grad(blocks, parameters, pull)],
        [whole, *torch.autograd.grad(whole, parameters, pull)],
        tolerance=1e-12,
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_a_sum_over_rows_gives_the_same_block_by_block(length: int | None) -> None:
    x, targets = normal(BATCH, SEQ, 11).requires_grad_(), integers(11, BATCH, SEQ)

    def loss(rows: Tensor, wanted: Tensor) -> Tensor:
        return nn.functional.cross_entropy(rows.flatten(0, 1), wanted.flatten(), reduction="sum")

    whole, blocks = loss(x, targets), sum_blocks(loss, x, targets, parameters=[], length=length)
    assert_all_close(
        [blocks, *torch.autograd.grad(blocks, x)], [whole, *torch.autograd.grad(whole, x)], tolerance=1e-12
    )


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("frozen", ["rows", "parameters"])
def test_a_sum_has_gradients_of_what_is_not_frozen(length: int | None, frozen: str) -> None:
    module, x = layer(), normal(BATCH, SEQ, 7)
    x.requires_grad_(frozen != "rows")
    module.requires_grad_(frozen != "parameters")
    parameters = list(module.parameters())
    wanted = parameters if frozen == "rows" else [x]
    blocks = sum_blocks(lambda rows: module(rows).square().sum(), x, parameters=parameters, length=length)
    whole = module(x).square().sum()
    assert_all_close(torch.autograd.grad(blocks, wanted), torch.autograd.grad(whole, wanted), tolerance=1e-12)


@pytest.mark.parametrize(("length", "calls"), [(None, 1), (5, 6), (28, 2), (29, 1)])
def test_a_block_is_computed_once_more_in_backward_and_never_without_gradients(
    length: int | None, calls: int
) -> None:
    module, seen = layer(), []

    def counted(x: Tensor) -> Tensor:
        seen.append(x.shape[1])
        out: Tensor = module(x)
        return out

    x = normal(BATCH, SEQ, 7).requires_grad_()
    out = map_blocks(counted, x, length=length)
    assert len(seen) == calls
    assert sum(seen) == SEQ
    out.sum().backward()
    assert len(seen) == (calls if length in (None, SEQ) else 2 * calls)
    with torch.no_grad():
        seen.clear()
        map_blocks(counted, x, length=length)
    assert len(seen) == calls


@pytest.mark.parametrize("length", [5, 31])
def test_a_random_function_draws_the_same_again_in_backward(length: int) -> None:
    x, pull = normal(BATCH, SEQ, 7).requires_grad_(), normal(BATCH, SEQ, 7, seed=1)

    def halved(rows: Tensor) -> Tensor:
        return nn.functional.dropout(rows, 0.5) ** 2

    torch.manual_seed(3)
    out = map_blocks(halved, x, length=length, random=True)
    torch.rand(17)
    place = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(out, x, pull)
    assert torch.equal(torch.get_rng_state(), place)
    # Of a kept entry (2x)² with gradient 8x, of a dropped one nothing.
    assert_all_close([gradient], [torch.where(out == 0, 0.0, 8 * x * pull)], tolerance=1e-12)


def test_the_inside_of_blocks_is_not_kept() -> None:
    module = nn.Sequential(nn.Linear(7, 997), nn.GELU(), nn.Linear(997, 11))
    x = normal(BATCH, 512, 7, dtype=torch.float32).requires_grad_()
    wide, narrow = tensor_bytes(BATCH, 512, 997), tensor_bytes(BATCH, 512, 11)
    assert allocations(lambda: module(x)).kept >= 2 * wide
    assert allocations(lambda: map_blocks(module, x, length=16)).kept <= 2 * narrow


@pytest.mark.parametrize("seq", [0, 1])
def test_empty_and_single_rows_are_fine(seq: int) -> None:
    assert map_blocks(layer(), normal(BATCH, seq, 7), length=5).shape == (BATCH, seq, 11)
