import cmath

import pytest
import torch

from reformer.attention.projection import unit_keys
from reformer.attention.rotary import angles, rotate
from tests.reformer.helpers import BATCH, HEADS, SEQ, assert_all_close, integers, normal

DIM = 10


def some_vectors(*, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normal(BATCH, HEADS, SEQ, DIM, seed=seed, dtype=dtype)


def test_angles_are_positions_times_geometric_frequencies() -> None:
    found = angles(torch.tensor([0, 1, 12345]), dim=5)
    assert found.dtype == torch.float64
    expected = [[p * 10_000.0 ** (-2 * i / 5) for i in range(3)] for p in (0, 1, 12345)]
    assert_all_close([found], [torch.tensor(expected, dtype=torch.float64)], tolerance=1e-12)


def test_halves_are_turned_as_complex_numbers() -> None:
    x = some_vectors()
    turned = rotate(x)
    for position in (0, 1, 7, SEQ - 1):
        for i in range(DIM // 2):
            before = complex(x[1, 2, position, i], x[1, 2, position, i + DIM // 2])
            after = before * cmath.exp(1j * position * 10_000.0 ** (-2 * i / DIM))
            assert float(turned[1, 2, position, i]) == pytest.approx(after.real, abs=1e-12)
            assert float(turned[1, 2, position, i + DIM // 2]) == pytest.approx(after.imag, abs=1e-12)


def test_products_depend_on_the_distance_alone() -> None:
    q, k = some_vectors(), some_vectors(seed=1)
    positions = integers(1000, BATCH, SEQ)
    logits = rotate(q, positions=positions) @ rotate(k, positions=positions).transpose(-1, -2)
    shifted = rotate(q, positions=positions + 613) @ rotate(k, positions=positions + 613).transpose(-1, -2)
    assert_all_close([shifted], [logits], tolerance=1e-11)
    assert not torch.allclose(rotate(q, positions=positions + 613) @ k.transpose(-1, -2), logits)
    assert not torch.allclose(q @ k.transpose(-1, -2), logits)


def test_lengths_and_so_unit_keys_commute_with_it() -> None:
    x = some_vectors()
    assert_all_close([rotate(x).norm(dim=-1)], [x.norm(dim=-1)], tolerance=1e-12)
    assert_all_close([unit_keys(rotate(x))], [rotate(unit_keys(x))], tolerance=1e-12)


def test_rows_can_stand_at_positions_of_their_own() -> None:
    x = some_vectors()
    positions = torch.stack([torch.arange(SEQ), torch.arange(SEQ) + 5])
    turned = rotate(x, positions=positions)
    assert torch.equal(turned[0], rotate(x)[0])
    long = normal(1, HEADS, SEQ + 5, DIM, seed=3)
    long[0, :, 5:] = x[1]
    assert_all_close([turned[1]], [rotate(long)[0, :, 5:]], tolerance=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
def test_the_millionth_token_is_turned_as_exactly_as_the_first(dtype: torch.dtype, tolerance: float) -> None:
    x = some_vectors(dtype=dtype)
    positions = torch.arange(10**6, 10**6 + SEQ).expand(BATCH, SEQ)
    turned = rotate(x, positions=positions)
    assert turned.dtype == dtype
    assert_all_close([turned], [rotate(x.double(), positions=positions)], tolerance=tolerance)


def test_the_gradient_is_turned_back() -> None:
    x, pull = some_vectors().requires_grad_(), some_vectors(seed=1)
    (gradient,) = torch.autograd.grad(rotate(x), x, pull)
    assert_all_close([rotate(gradient)], [pull], tolerance=1e-12)


@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0)])
def test_an_empty_input_gives_an_empty_output(batch: int, seq: int) -> None:
    assert rotate(torch.empty(batch, HEADS, seq, DIM)).shape == (batch, HEADS, seq, DIM)
