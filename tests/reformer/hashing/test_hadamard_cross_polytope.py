import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reformer import HadamardCrossPolytope
from reformer.hashing.buckets import Buckets
from reformer.hashing.hadamard_cross_polytope import pseudo_rotate, random_signs
from tests.reformer.hashing.test_walsh_hadamard import hadamard_matrix
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal

ROUNDS, SIZE = 5, 8


def hashed(vectors: Tensor, n_buckets: Buckets) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return HadamardCrossPolytope()(vectors, n_hashes=ROUNDS, n_buckets=n_buckets, generator=generator)


def diagonals(rotations: int) -> Tensor:
    """[stages, heads, rounds, rotations, padded dim]."""
    generator = torch.Generator().manual_seed(3)
    return random_signs(3, HEADS, ROUNDS, rotations, SIZE, generator=generator).double()


@pytest.mark.parametrize(("n_buckets", "rotations"), [(2, 1), (12, 1), (16, 1), (18, 2), (36, 3)])
def test_a_bucket_is_the_nearest_axis_of_three_sign_flips_and_hadamard_matrices(
    n_buckets: int, rotations: int
) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    b, h, r, i = 1, 2, 4, 17
    matrix = hadamard_matrix(SIZE)
    coordinates = []
    for rotation in range(rotations):
        d1, d2, d3 = (torch.diag(d) for d in diagonals(rotations)[:, h, r, rotation])
        coordinates.append(matrix @ d3 @ matrix @ d2 @ matrix @ d1 @ F.pad(vectors[b, h, i], (0, SIZE - DIM)))
    p = torch.cat(coordinates)[: n_buckets // 2]
    assert hashed(vectors, n_buckets)[b, h, r, i] == torch.cat([p, -p]).argmax()


def test_factors_take_coordinates_of_their_own() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    flips = diagonals(1)[:, :, :, 0][:, None, :, :, None]
    p = pseudo_rotate(F.pad(vectors, (0, SIZE - DIM))[:, :, None], flips)
    first = torch.cat([p[..., :2], -p[..., :2]], dim=-1).argmax(dim=-1)
    second = torch.cat([p[..., 2:5], -p[..., 2:5]], dim=-1).argmax(dim=-1)
    assert torch.equal(hashed(vectors, (4, 6)), first + 4 * second)


def test_a_pseudo_rotation_is_a_rotation() -> None:
    x = normal(3, SEQ, SIZE)
    rotated = pseudo_rotate(x, diagonals(1)[:, 0, 0, 0][:, None, None])
    torch.testing.assert_close(rotated @ rotated.mT, x @ x.mT, rtol=0, atol=1e-12)


def test_signs_are_signs_and_about_half_of_them_are_negative() -> None:
    signs = random_signs(10_007, generator=torch.Generator().manual_seed(0))
    assert {*signs.tolist()} == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.05


def test_opposite_vectors_land_in_opposite_buckets() -> None:
    # Of full length: on padded vectors two coordinates can be equal, and the tie goes one way for both.
    vectors = normal(BATCH, HEADS, SEQ, SIZE)
    assert torch.equal((hashed(vectors, 16) + 8) % 16, hashed(-vectors, 16))
