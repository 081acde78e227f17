import pytest
import torch
from torch import Tensor

from reformer import OrthogonalHyperplane
from reformer.hashing.orthogonal_hyperplane import orthonormal_columns
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal


def gram_schmidt(columns: Tensor) -> Tensor:
    """The slow twin: each column without its part along those before, at unit length."""
    done: list[Tensor] = []
    for column in columns.unbind(-1):
        for other in done:
            column = column - (column @ other) * other
        done.append(column / column.norm())
    return torch.stack(done, dim=-1)


@pytest.mark.parametrize("columns", [1, 3, DIM])
def test_columns_are_those_of_gram_schmidt(columns: int) -> None:
    x = normal(HEADS, DIM, columns)
    found = orthonormal_columns(x)
    torch.testing.assert_close(found.mT @ found, torch.eye(columns).double().expand(HEADS, -1, -1))
    for h in range(HEADS):
        torch.testing.assert_close(found[h], gram_schmidt(x[h]), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n_buckets", "blocks"), [(8, (3,)), (2**DIM, (7,)), (2 ** (2 * DIM + 3), (7, 7, 7))]
)
def test_an_id_is_the_signs_of_the_projections_block_by_block(
    n_buckets: int, blocks: tuple[int, ...]
) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    rounds, width = 5, blocks[0]
    ids = OrthogonalHyperplane()(
        vectors, n_hashes=rounds, n_buckets=n_buckets, generator=torch.Generator().manual_seed(3)
    )
    drawn = torch.randn(
        HEADS,
        rounds,
        len(blocks),
        DIM,
        width,
        generator=torch.Generator().manual_seed(3),
        dtype=torch.float32,
    )
    b, h, r, i = 1, 2, 4, 17
    normals = [normal for block in drawn[h, r].double() for normal in gram_schmidt(block).unbind(-1)]
    count = n_buckets.bit_length() - 1
    expected = sum(int(vectors[b, h, i] @ normals[bit] > 0) << bit for bit in range(count))
    assert ids[b, h, r, i] == expected


def test_opposite_vectors_have_all_bits_flipped() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)

    def ids(x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(3)
        return OrthogonalHyperplane()(x, n_hashes=5, n_buckets=16, generator=generator)

    assert torch.equal(15 - ids(vectors), ids(-vectors))


def test_a_basis_of_the_plane_moves_every_vector_that_is_turned_by_a_right_angle() -> None:
    # Its two hyperplanes cut the plane into quadrants; independent ones leave one pair in four together.
    pair = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).expand(1, 20_000, 2, 2)
    ids = OrthogonalHyperplane()(pair, n_hashes=1, n_buckets=4, generator=torch.Generator().manual_seed(3))
    assert (ids[..., 0] != ids[..., 1]).all()


@pytest.mark.parametrize(("n_buckets", "use"), [(6, "4 or 8"), ((4, 6), "16 or 32")])
def test_counts_that_are_no_power_of_two_are_refused_with_the_nearest_ones(n_buckets: int, use: str) -> None:
    with pytest.raises(ValueError, match=f"the orthogonal_hyperplane family makes powers of two; use {use}"):
        OrthogonalHyperplane().check(n_buckets)
