import pytest
import torch

from reformer import Random
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal


def hashed(vectors: torch.Tensor, *, n_buckets: int = 6, n_hashes: int = 5, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return Random()(vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)


def test_buckets_know_nothing_of_content_row_or_length() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    ids = hashed(vectors)
    assert torch.equal(hashed(normal(BATCH, HEADS, SEQ, DIM, seed=1)), ids)
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(hashed(normal(BATCH, HEADS, 2 * SEQ, 2 * DIM))[..., :SEQ], ids)


def test_more_rounds_or_heads_leave_the_first_ones_as_they_are() -> None:
    ids = hashed(normal(BATCH, HEADS, SEQ, DIM))
    assert torch.equal(hashed(normal(BATCH, HEADS, SEQ, DIM), n_hashes=7)[:, :, :5], ids)
    assert torch.equal(hashed(normal(BATCH, 2 * HEADS, SEQ, DIM))[:, :HEADS], ids)


@pytest.mark.parametrize("n_buckets", [2, 6, 16])
def test_buckets_are_filled_evenly(n_buckets: int) -> None:
    ids = hashed(torch.empty(1, 3, 10_007, 1), n_buckets=n_buckets).flatten()
    counts = ids.bincount(minlength=n_buckets).double()
    expected = ids.numel() / n_buckets
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    # Mean n − 1, standard deviation √(2(n − 1)).
    degrees = n_buckets - 1
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_neighbours_heads_rounds_and_seeds_are_independent() -> None:
    empty = torch.empty(1, 3, 10_007, 1)
    ids = hashed(empty, n_buckets=4)
    chance, error = 1 / 4, (1 / 4 * 3 / 4 / 10_007) ** 0.5
    pairs = [
        (ids[0, 0, 0, 1:], ids[0, 0, 0, :-1]),
        (ids[0, 0, 0, 2:], ids[0, 0, 0, :-2]),
        (ids[0, 0, 0], ids[0, 1, 0]),
        (ids[0, 0, 0], ids[0, 0, 1]),
        (ids[0, 0, 1], ids[0, 1, 0]),
        (ids[0, 0, 0], hashed(empty, n_buckets=4, seed=4)[0, 0, 0]),
    ]
    for a, b in pairs:
        assert abs(float((a == b).double().mean()) - chance) < 5 * error
