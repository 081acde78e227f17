"""Hashing tokens as they come, by the draw that hashes them all at once."""

import pytest
import torch
from torch import Tensor

from reformer.hashing import (
    BitSampling,
    Codeword,
    CrossPolytope,
    HadamardCrossPolytope,
    HashFamily,
    Hyperplane,
    OrthogonalHyperplane,
    Random,
    Syndrome,
)
from tests.reformer.helpers import BATCH, HEADS, SEQ, integers, normal

FAMILIES = (
    BitSampling(),
    Codeword(),
    CrossPolytope(),
    HadamardCrossPolytope(),
    Hyperplane(),
    OrthogonalHyperplane(),
    Random(),
    Syndrome(),
)
N_HASHES = 3


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("n_buckets", [8, (4, 8)], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_tokens_one_by_one_get_the_buckets_of_the_whole(
    family: HashFamily, n_buckets: int | tuple[int, int]
) -> None:
    vectors = normal(BATCH, HEADS, SEQ, 7)
    counts = {"n_hashes": N_HASHES, "n_buckets": n_buckets}
    expected = family(vectors, generator=generator(), **counts)
    drawn = family.draw(vectors[:, :, :1], generator=generator(), **counts)
    positions = torch.arange(SEQ)
    each = [drawn(vectors[:, :, [i]], positions[None, [i]]) for i in range(SEQ)]
    assert torch.equal(torch.cat(each, dim=-1), expected)
    assert torch.equal(drawn(vectors, positions[None]), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_rows_may_stand_at_positions_of_their_own(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, 7)
    expected = family(vectors, n_hashes=N_HASHES, n_buckets=8, generator=generator())
    drawn = family.draw(vectors, n_hashes=N_HASHES, n_buckets=8, generator=generator())
    positions = integers(SEQ, BATCH, 5)

    def at_positions(x: Tensor, *, dim: int) -> Tensor:
        rows = [row.index_select(dim, index) for row, index in zip(x, positions, strict=True)]
        return torch.stack(rows)

    found = drawn(at_positions(vectors, dim=1), positions)
    assert torch.equal(found, at_positions(expected, dim=2))


def test_a_rotation_made_of_the_tokens_cannot_be_drawn_before_they_are_there() -> None:
    family = CrossPolytope(data_rotation=True)
    with pytest.raises(ValueError, match="so tokens cannot come one by one"):
        family.draw(normal(BATCH, HEADS, SEQ, 7), n_hashes=1, n_buckets=4, generator=generator())
