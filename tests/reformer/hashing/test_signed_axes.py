import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reformer.hashing import signed_axes
from tests.reformer.helpers import BATCH, HEADS, SEQ, normal


def first_argmax(p: Tensor) -> Tensor:
    """The slow twin: both signs side by side."""
    return torch.cat([p, -p], dim=-1).argmax(dim=-1)


def test_the_nearest_signed_axis_is_the_argmax_over_both_signs() -> None:
    p = normal(BATCH, HEADS, SEQ, 13)
    assert torch.equal(signed_axes.nearest_signed_axis(p), first_argmax(p))


def test_the_nearest_signed_axis_of_one_column_is_its_sign() -> None:
    assert signed_axes.nearest_signed_axis(torch.tensor([[2.0], [-2.0], [0.0]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("coordinates", "axis"),
    [([1.0, -1.0, 1.0], 0), ([-1.0, 1.0, 1.0], 1), ([-1.0, -1.0, 0.0], 3), ([0.0, 0.0, 0.0], 0)],
)
def test_ties_go_to_the_lowest_id(coordinates: list[float], axis: int) -> None:
    assert signed_axes.nearest_signed_axis(torch.tensor(coordinates)).item() == axis


def test_factors_are_digits_of_a_mixed_radix_number_the_first_fastest() -> None:
    p = normal(SEQ, 2 + 3)
    ids = signed_axes.bucket_ids(p, n_buckets=(4, 6))
    assert torch.equal(ids, first_argmax(p[:, :2]) + 4 * first_argmax(p[:, 2:]))


even = st.integers(1, 12).map(lambda half: 2 * half)


@given(even, even, st.integers(0, 2**16))
def test_a_factorised_id_is_that_of_both_factors_apart(first: int, second: int, seed: int) -> None:
    p = normal(SEQ, (first + second) // 2, seed=seed)
    apart = [
        signed_axes.bucket_ids(block, n_buckets=count)
        for block, count in zip(p.split([first // 2, second // 2], dim=-1), (first, second), strict=True)
    ]
    ids = signed_axes.bucket_ids(p, n_buckets=(first, second))
    assert torch.equal(ids, apart[0] + first * apart[1])
    assert all(0 <= index < first * second for index in ids.tolist())


@given(even, even)
def test_every_pair_of_factors_has_an_id_of_its_own_and_every_id_a_pair(first: int, second: int) -> None:
    axes = [torch.cat([torch.eye(count // 2), -torch.eye(count // 2)]) for count in (first, second)]
    pairs = torch.cat([axes[0].repeat(second, 1), axes[1].repeat_interleave(first, dim=0)], dim=-1)
    ids = signed_axes.bucket_ids(pairs, n_buckets=(first, second))
    assert torch.equal(ids, torch.arange(first * second))


@pytest.mark.parametrize(("n_buckets", "axes"), [(2, 1), (16, 8), ((4, 6), 5), ((16, 32), 24)])
def test_an_axis_serves_two_buckets(n_buckets: int | tuple[int, int], axes: int) -> None:
    assert signed_axes.n_axes(n_buckets) == axes
