"""What every family promises."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import (
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
from reformer.attention.options import hash_vectors
from reformer.hashing import buckets
from reformer.hashing.buckets import Buckets
from tests.reformer.helpers import BATCH, HEADS, SEQ, normal

#: A prime that has room for the 18 coordinates of (32, 4) codewords.
DIM = 19
ROUNDS = 5
TOKEN_WISE = (
    CrossPolytope(),
    HadamardCrossPolytope(),
    Hyperplane(),
    OrthogonalHyperplane(),
    BitSampling(),
    Syndrome(),
    Syndrome(row_weight=1),
    Codeword(),
    Random(),
)
FAMILIES = (*TOKEN_WISE, CrossPolytope(data_rotation=True))
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


def hashed(
    family: HashFamily, vectors: Tensor, *, n_buckets: Buckets = 16, n_hashes: int = ROUNDS, seed: int = 3
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return family(vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)


def test_every_family_there_is_is_tested_here() -> None:
    ours = {kind for kind in HashFamily.__subclasses__() if kind.__module__.startswith("reformer.")}
    assert {type(family) for family in FAMILIES} == ours


@every_family
@pytest.mark.parametrize("n_buckets", [2, 16, (2, 8), (32, 4)])
def test_ids_are_in_range_and_use_all_of_it(family: HashFamily, n_buckets: Buckets) -> None:
    ids = hashed(family, normal(BATCH, HEADS, 1009, DIM), n_buckets=n_buckets)
    assert ids.shape == (BATCH, HEADS, ROUNDS, 1009)
    assert ids.dtype == torch.int64
    assert ids.min() == 0
    assert ids.max() == buckets.total(n_buckets) - 1


@every_family
def test_the_generator_alone_decides(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    before = torch.get_rng_state()
    assert torch.equal(hashed(family, vectors), hashed(family, vectors))
    assert not torch.equal(hashed(family, vectors), hashed(family, vectors, seed=4))
    assert torch.equal(torch.get_rng_state(), before)


@every_family
def test_rounds_and_heads_are_drawn_apart(family: HashFamily) -> None:
    ids = hashed(family, normal(1, 1, SEQ, DIM).expand(1, HEADS, SEQ, DIM))
    every = ids[0].flatten(0, 1)
    assert len({tuple(row) for row in every.tolist()}) == HEADS * ROUNDS


@every_family
def test_batch_rows_share_the_draw_and_nothing_else(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    ids = hashed(family, vectors)
    assert torch.equal(hashed(family, vectors[1:]), ids[1:])
    assert torch.equal(hashed(family, vectors.flip(0)), ids.flip(0))


@pytest.mark.parametrize("family", TOKEN_WISE, ids=str)
def test_a_bucket_depends_on_its_token_alone(family: HashFamily) -> None:
    assert family.token_wise
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    ids = hashed(family, vectors)
    others_changed = normal(BATCH, HEADS, SEQ, DIM, seed=1)
    others_changed[:, :, 17] = vectors[:, :, 17]
    assert torch.equal(hashed(family, others_changed)[..., 17], ids[..., 17])
    assert torch.equal(hashed(family, vectors[:, :, :23]), ids[..., :23])


@pytest.mark.parametrize("family", [family for family in TOKEN_WISE if family != Random()], ids=str)
def test_permuted_tokens_have_permuted_buckets(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    order = torch.randperm(SEQ, generator=torch.Generator().manual_seed(5))
    assert torch.equal(hashed(family, vectors[:, :, order]), hashed(family, vectors)[..., order])


@every_family
def test_length_of_a_vector_does_not_matter(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    assert torch.equal(hashed(family, 1e-3 * vectors), hashed(family, vectors))


@every_family
def test_nan_and_infinity_stay_in_range(family: HashFamily) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    vectors[0, 0, 3], vectors[0, 1, 5], vectors[1, 2, 7, 2] = torch.nan, torch.inf, -torch.inf
    for n_buckets in (16, (4, 8)):
        ids = hashed(family, vectors, n_buckets=n_buckets)
        assert ids.min() >= 0
        assert ids.max() < buckets.total(n_buckets)


@every_family
@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0), (BATCH, 1)])
def test_few_or_no_vectors_are_hashed_all_the_same(family: HashFamily, batch: int, seq: int) -> None:
    for n_buckets in (16, (4, 8)):
        ids = hashed(family, torch.ones(batch, HEADS, seq, DIM), n_buckets=n_buckets)
        assert ids.shape == (batch, HEADS, ROUNDS, seq)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_wide_dtypes_use_the_same_draw(family: HashFamily, dtype: torch.dtype) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    same = hashed(family, vectors.to(dtype)) == hashed(family, vectors)
    assert same.double().mean() > 0.99


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_vectors_are_hashed_as_their_float32_selves(family: HashFamily, dtype: torch.dtype) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM).to(dtype)
    generator = torch.Generator().manual_seed(3)
    ids = hash_vectors(vectors, hashing=family, n_hashes=ROUNDS, n_buckets=16, generator=generator)
    assert torch.equal(ids, hashed(family, vectors.float()))


@every_family
def test_strides_are_accepted_and_vectors_left_as_they_are(family: HashFamily) -> None:
    vectors = normal(BATCH, SEQ, HEADS, DIM).transpose(1, 2)
    before = vectors.clone()
    assert torch.equal(hashed(family, vectors), hashed(family, vectors.contiguous()))
    assert torch.equal(vectors, before)


@every_family
@pytest.mark.parametrize("n_buckets", [0, -2, 3, 1, (4, 3), (4, 0), ()])
def test_impossible_counts_are_refused_when_checked_and_when_hashed(
    family: HashFamily, n_buckets: Any, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=r"n_buckets=.*use"):
        family.check(n_buckets)
    with pytest.raises(ValueError, match=r"n_buckets=.*use"):
        hashed(family, normal(BATCH, HEADS, SEQ, DIM), n_buckets=n_buckets)


@every_family
def test_a_family_is_a_value(family: HashFamily) -> None:
    assert family == dataclasses.replace(family)
    assert hash(family) == hash(dataclasses.replace(family))
    assert family != next(other for other in FAMILIES if other is not family)
    with pytest.raises(dataclasses.FrozenInstanceError):
        family.seed = 3  # type: ignore[attr-defined]


# Collision probabilities against a Monte Carlo estimate.

PAIRS = 100_000
DISTANCES = {"angle": (0.1, 0.6, 1.2, math.pi / 2, 2.4), "flip_rate": (0.02, 0.1, 0.25, 0.5, 0.9)}
LAWS: list[tuple[HashFamily, Buckets]] = [
    (CrossPolytope(), 2),
    (CrossPolytope(), 16),
    (CrossPolytope(), (4, 6)),
    # As many as an automatic count makes.
    (CrossPolytope(), 128),
    (CrossPolytope(), (16, 16)),
    (Hyperplane(), 2),
    (Hyperplane(), 16),
    (Hyperplane(), 256),
    (BitSampling(), 2),
    (BitSampling(), 32),
    (BitSampling(), (2, 4)),
    (Syndrome(), 2),
    (Syndrome(), 16),
    (Syndrome(row_weight=1), 16),
    (Syndrome(row_weight=3), (4, 4)),
    (Syndrome(row_weight=5), 2),
    (Random(), 6),
]


def collision_rates(family: HashFamily, *, n_buckets: Buckets, dim: int = 5, seed: int = 11) -> list[float]:
    """How often fresh pairs collide under a fresh draw of the family each, at every distance.

    A head is one draw; its tokens are a vector and one partner a distance, so that draws at *one* distance
    are independent of each other.
    """
    vectors = at_angles(dim, seed=seed) if family.distance == "angle" else at_flip_rates(dim, seed=seed)
    ids = hashed(family, vectors[None], n_buckets=n_buckets, n_hashes=1, seed=seed)[0, :, 0]
    return [float(rate) for rate in (ids[:, 1:] == ids[:, :1]).double().mean(dim=0)]


def at_angles(dim: int, *, seed: int) -> Tensor:
    first = torch.nn.functional.normalize(normal(PAIRS, 1, dim, seed=seed), dim=-1)
    other = normal(PAIRS, 1, dim, seed=seed + 1)
    other = torch.nn.functional.normalize(other - (other * first).sum(-1, keepdim=True) * first, dim=-1)
    return torch.cat(
        [first, *(math.cos(angle) * first + math.sin(angle) * other for angle in DISTANCES["angle"])], dim=1
    ).float()


def at_flip_rates(dim: int, *, seed: int) -> Tensor:
    first = normal(PAIRS, 1, dim, seed=seed)
    chance = torch.rand(PAIRS, 1, dim, generator=torch.Generator().manual_seed(seed + 1))
    return torch.cat(
        [first, *(torch.where(chance < rate, -first, first) for rate in DISTANCES["flip_rate"])], dim=1
    ).float()


@pytest.mark.parametrize(("family", "n_buckets"), LAWS, ids=str)
def test_collisions_are_as_frequent_as_predicted(family: HashFamily, n_buckets: Buckets) -> None:
    found = collision_rates(family, n_buckets=n_buckets)
    for distance, rate in zip(DISTANCES[family.distance], found, strict=True):
        predicted = family.collision_probability(distance, n_buckets=n_buckets, dim=5)
        assert predicted is not None
        standard_error = math.sqrt(predicted * (1 - predicted) / PAIRS)
        assert abs(rate - predicted) <= 4 * standard_error, distance
        # A curve off by 3 standard errors would be found: the test can tell near curves apart.
        assert standard_error < 2e-3


@pytest.mark.parametrize(("family", "n_buckets"), LAWS, ids=str)
def test_equal_vectors_always_collide_unless_buckets_are_random(
    family: HashFamily, n_buckets: Buckets
) -> None:
    expected = 1 / buckets.total(n_buckets) if isinstance(family, Random) else 1.0
    assert family.collision_probability(0.0, n_buckets=n_buckets, dim=7) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "family",
    [HadamardCrossPolytope(), OrthogonalHyperplane(), Codeword(), CrossPolytope(data_rotation=True)],
    ids=str,
)
def test_where_no_closed_form_is_known_none_is_claimed(family: HashFamily) -> None:
    assert family.collision_probability(0.5, n_buckets=16, dim=DIM) is None


@pytest.mark.parametrize("n_buckets", [2, 16, (4, 4)])
@pytest.mark.parametrize(
    ("family", "relative"),
    [(HadamardCrossPolytope(), CrossPolytope()), (OrthogonalHyperplane(), Hyperplane())],
    ids=str,
)
def test_structured_draws_collide_about_as_often_as_gaussian_ones(
    family: HashFamily, relative: HashFamily, n_buckets: Buckets
) -> None:
    dim = 16
    found = collision_rates(family, n_buckets=n_buckets, dim=dim)
    for angle, rate in zip(DISTANCES["angle"], found, strict=True):
        expected = relative.collision_probability(angle, n_buckets=n_buckets, dim=dim)
        assert rate == pytest.approx(expected, abs=0.03)


def test_codewords_bring_neighbours_together_and_dense_syndromes_keep_them_apart() -> None:
    dim, (_, near, _, unrelated, _) = 32, DISTANCES["flip_rate"]
    assert (near, unrelated) == (0.1, 0.5)
    codeword, sampled, syndrome = (
        collision_rates(family, n_buckets=16, dim=dim) for family in (Codeword(), BitSampling(), Syndrome())
    )
    assert sampled[1] == pytest.approx(0.9**4, abs=0.01)
    assert codeword[1] > 0.9 * sampled[1]
    assert syndrome[1] < 0.2 * sampled[1]
    for strangers in (codeword[3], sampled[3], syndrome[3]):
        assert strangers == pytest.approx(1 / 16, abs=0.025)
