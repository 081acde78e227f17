"""Sign random projections on orthonormal normals."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import bits, buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily


@dataclass(frozen=True, kw_only=True)
class OrthogonalHyperplane(HashFamily):
    """As `Hyperplane`, but with normals at right angles to each other, which repeat less of each other.

    Where there are more bits than dimensions, each block of `dim` normals is a basis of its own.

    Source: Ji et al. 2012, "Super-bit locality-sensitive hashing".
    """

    def __call__(
        self,
        vectors: Float[Tensor, "batch heads seq dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        self.check(n_buckets)
        _, heads, _, dim = vectors.shape
        count = buckets.bits(n_buckets)
        blocks = -(-count // dim)
        normals = torch.randn(heads, n_hashes, blocks, dim, min(count, dim), generator=generator)
        rows = orthonormal_columns(normals).transpose(-1, -2).flatten(2, 3)[:, :, :count]
        return bits.as_number(
            torch.einsum("bhld,hrkd->bhrlk", vectors, rows.to(vectors, non_blocking=True)) > 0
        )

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check_power_of_two(n_buckets, family="orthogonal_hyperplane")

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """None: the bits are not independent. One bit is a hyperplane's."""
        return None


def orthonormal_columns(
    normal: Float[Tensor, "*rows dim columns"],
) -> Float[Tensor, "*rows dim columns"]:
    """Uniformly distributed orthonormal columns from independent Gaussian ones, at most `dim` of them.

    Q of a QR decomposition is uniform only if the diagonal of R is positive, which LAPACK does not care
    for. In float64, so that the float32 result is the same whichever library decomposes.

    Source: Mezzadri 2007, "How to generate random matrices from the classical compact groups".
    """
    q, r = torch.linalg.qr(normal.double())
    negative = r.diagonal(dim1=-2, dim2=-1) < 0
    return torch.where(negative[..., None, :], -q, q).to(normal.dtype)
