"""What every family promises."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import CrossPolytope, HashFamily, Hyperplane, Random
from reformer.hashing import buckets
from reformer.hashing.buckets import Buckets
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal

FAMILIES = (CrossPolytope(), Hyperplane(), Random())
ROUNDS = 5


def hashed(
    family: HashFamily, vectors: Tensor, *, n_buckets: Buckets = 16, n_hashes: int = ROUNDS, seed: int = 3
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return family(vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_buckets", [2, 16, (2, 8), (32, 4)])
def test_ids_are_in_range_and_use_all_of_it(family: HashFamily, n_buckets: Buckets) -> None:
    ids = hashed(family, normal(BATCH, HEADS, 1009, DIM), n_buckets=n_buckets)
    assert ids.shape == (BATCH, HEADS, ROUNDS, 1009)
    assert ids.dtype == torch.int64
    assert ids.min() == 0
    assert ids.max() == buckets.total(n_buckets) - 1


@pytest.mark.parametrize("family", FAMILIES)
def test_the_generator_alone_decides(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    before = torch.get_rng_state()
    assert torch.equal(hashed(family, vectors), hashed(family, vectors))
    assert not torch.equal(hashed(family, vectors), hashed(family, vectors, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_rounds_and_heads_are_drawn_apart(family: HashFamily) -> None:
    ids = hashed(family, normal(1, 1, SEQ, DIM).expand(1, HEADS, SEQ, DIM))
    every = ids[0].flatten(0, 1)
    assert len({tuple(row) for row in every.tolist()}) == HEADS * ROUNDS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bucket_depends_on_its_token_alone_and_on_no_row(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    ids = hashed(family, vectors)
    others_changed = normal(BATCH, HEADS, SEQ, DIM, seed=1)
    others_changed[:, :, 17] = vectors[:, :, 17]
    assert torch.equal(hashed(family, others_changed)[..., 17], ids[..., 17])
    assert torch.equal(hashed(family, vectors[:, :, :23]), ids[..., :23])
    assert torch.equal(hashed(family, vectors[1:]), ids[1:])


@pytest.mark.parametrize("family", [CrossPolytope(), Hyperplane()])
def test_length_of_a_vector_does_not_matter(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    assert torch.equal(hashed(family, 1e-3 * vectors), hashed(family, vectors))


@pytest.mark.parametrize("family", FAMILIES)
def test_nan_and_infinity_stay_in_range(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    vectors[0, 0, 3], vectors[0, 1, 5], vectors[1, 2, 7, 2] = torch.nan, torch.inf, -torch.inf
    for n_buckets in (16, (4, 8)):
        ids = hashed(family, vectors, n_buckets=n_buckets)
        assert ids.min() >= 0
        assert ids.max() < buckets.total(n_buckets)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0)])
def test_nothing_hashes_to_nothing(family: HashFamily, batch: int, seq: int) -> None:
    assert hashed(family, torch.empty(batch, HEADS, seq, DIM)).shape == (batch, HEADS, ROUNDS, seq)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_wide_dtypes_use_the_same_draw(family: HashFamily, dtype: torch.dtype) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    same = hashed(family, vectors.to(dtype)) == hashed(family, vectors)
    assert same.double().mean() > 0.99


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n_buckets", [0, -2, 3, 1, (4, 3), (4, 0), ()])
def test_impossible_counts_are_refused_when_checked_and_when_hashed(
    family: HashFamily, n_buckets: Any, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=r"n_buckets=.*use"):
        family.check(n_buckets)
    with pytest.raises(ValueError, match=r"n_buckets=.*use"):
        hashed(family, normal(BATCH, HEADS, SEQ, DIM), n_buckets=n_buckets)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_a_value(family: HashFamily) -> None:
    assert family == type(family)()
    assert hash(family) == hash(type(family)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.seed = 3  # type: ignore[attr-defined]


# Collision probabilities against a Monte Carlo estimate.

PAIRS = 100_000
LAWS: list[tuple[HashFamily, Buckets]] = [
    (CrossPolytope(), 2),
    (CrossPolytope(), 16),
    (CrossPolytope(), (4, 6)),
    (Hyperplane(), 2),
    (Hyperplane(), 16),
    (Random(), 6),
]


def pairs_at(angle: float, *, dim: int, seed: int) -> Tensor:
    """Fresh pairs of unit vectors at an angle, one a head."""
    first = torch.nn.functional.normalize(normal(PAIRS, dim, seed=seed), dim=-1)
    other = normal(PAIRS, dim, seed=seed + 1)
    other = torch.nn.functional.normalize(other - (other * first).sum(-1, keepdim=True) * first, dim=-1)
    second = math.cos(angle) * first + math.sin(angle) * other
    return torch.stack([first, second], dim=1).float()[None]


@pytest.mark.parametrize(("family", "n_buckets"), LAWS)
@pytest.mark.parametrize("angle", [0.1, 0.6, 1.2, math.pi / 2, 2.4])
def test_collisions_are_as_frequent_as_predicted(
    family: HashFamily, n_buckets: Buckets, angle: float
) -> None:
    dim = 5
    predicted = family.collision_probability(angle, n_buckets=n_buckets, dim=dim)
    assert predicted is not None
    ids = hashed(
        family, pairs_at(angle, dim=dim, seed=int(100 * angle)), n_buckets=n_buckets, n_hashes=1, seed=11
    )
    found = float((ids[..., 0] == ids[..., 1]).double().mean())
    standard_error = math.sqrt(predicted * (1 - predicted) / PAIRS)
    assert abs(found - predicted) <= 4 * standard_error
    # A curve off by 3 standard errors would be found: the test can tell near curves apart.
    assert standard_error < 2e-3


@pytest.mark.parametrize(("family", "n_buckets"), LAWS)
def test_equal_vectors_always_collide_unless_buckets_are_random(
    family: HashFamily, n_buckets: Buckets
) -> None:
    expected = 1 / buckets.total(n_buckets) if isinstance(family, Random) else 1.0
    assert family.collision_probability(0.0, n_buckets=n_buckets, dim=7) == pytest.approx(expected, abs=1e-4)
