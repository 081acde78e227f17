import math

import pytest
import torch

from reformer import Hyperplane
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal


def test_an_id_is_the_signs_of_the_projections_as_a_binary_number() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM, dtype=torch.float32)
    ids = Hyperplane()(vectors, n_hashes=5, n_buckets=8, generator=torch.Generator().manual_seed(3))
    normals = torch.randn(HEADS, DIM, 5, 3, generator=torch.Generator().manual_seed(3))
    b, h, r, i = 1, 2, 4, 17
    bits = [int(vectors[b, h, i] @ normals[h, :, r, bit] > 0) for bit in range(3)]
    assert ids[b, h, r, i] == bits[0] + 2 * bits[1] + 4 * bits[2]


def test_opposite_vectors_have_all_bits_flipped() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)

    def ids(x: torch.Tensor) -> torch.Tensor:
        return Hyperplane()(x, n_hashes=5, n_buckets=16, generator=torch.Generator().manual_seed(3))

    assert torch.equal(15 - ids(vectors), ids(-vectors))


@pytest.mark.parametrize(("n_buckets", "use"), [(6, "4 or 8"), (12, "8 or 16"), ((4, 6), "16 or 32")])
def test_counts_that_are_no_power_of_two_are_refused_with_the_nearest_ones(n_buckets: int, use: str) -> None:
    with pytest.raises(ValueError, match=f"the hyperplane family makes powers of two; use {use}"):
        Hyperplane().check(n_buckets)


def test_the_collision_curve_is_a_power_of_the_share_of_hyperplanes_that_miss_the_angle() -> None:
    for angle in (0.0, 0.3, 1.1, math.pi):
        predicted = Hyperplane().collision_probability(angle, n_buckets=16, dim=DIM)
        assert predicted == pytest.approx((1 - angle / math.pi) ** 4, abs=1e-12)
