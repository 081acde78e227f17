import math

import pytest
import torch

from reformer import BitSampling
from reformer.hashing import bits
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal


def hashed(vectors: torch.Tensor, n_buckets: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return BitSampling()(vectors, n_hashes=5, n_buckets=n_buckets, generator=generator)


@pytest.mark.parametrize("count", [1, 3, DIM])
def test_an_id_is_the_signs_of_some_coordinates_as_a_binary_number(count: int) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    generator = torch.Generator().manual_seed(3)
    positions = bits.distinct_positions(HEADS, 5, dim=DIM, count=count, generator=generator)
    ids = hashed(vectors, 2**count)
    for b, h, r, i in ((0, 0, 0, 0), (1, 2, 4, 17)):
        coordinates = vectors[b, h, i, positions[h, r]].tolist()
        assert ids[b, h, r, i] == sum((value > 0) << place for place, value in enumerate(coordinates))


def test_with_as_many_bits_as_coordinates_only_equal_signs_collide() -> None:
    vectors = normal(1, 1, SEQ, DIM)
    vectors[0, 0, 5] = 3 * vectors[0, 0, 4]
    vectors[0, 0, 6] = vectors[0, 0, 4] * torch.tensor([-1.0] + [1.0] * (DIM - 1))
    ids = hashed(vectors, 2**DIM)[0, 0]
    assert torch.equal(ids[:, 5], ids[:, 4])
    assert (ids[:, 6] != ids[:, 4]).all()


@pytest.mark.parametrize("flip_rate", [0.0, 0.02, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 4, DIM])
def test_the_collision_curve_averages_over_the_flips_of_a_vector(flip_rate: float, count: int) -> None:
    expected = sum(
        chance * math.comb(DIM - t, count) / math.comb(DIM, count)
        for t, chance in enumerate(bits.flip_counts(DIM, flip_rate=flip_rate))
    )
    predicted = BitSampling().collision_probability(flip_rate, n_buckets=2**count, dim=DIM)
    assert predicted == pytest.approx(expected, abs=1e-12)


def test_more_bits_than_coordinates_are_refused_where_the_coordinates_are_known(unchecked: None) -> None:
    says = "n_buckets=256: the bit_sampling family takes 8 distinct coordinates, and vectors have 7; use 128"
    BitSampling().check(256)
    BitSampling().check(256, dim=8)
    with pytest.raises(ValueError, match=says):
        BitSampling().check(256, dim=DIM)
    with pytest.raises(ValueError, match=says):
        hashed(normal(BATCH, HEADS, SEQ, DIM), 256)


def test_counts_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="the bit_sampling family makes powers of two; use 8 or 16"):
        BitSampling().check(12)
