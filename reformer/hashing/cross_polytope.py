"""The paper's hash family: the nearest signed axis after a random rotation."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import buckets, signed_axes
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily, HashFunction


@dataclass(frozen=True, kw_only=True)
class CrossPolytope(HashFamily):
    """Bucket = argmax of [xG, −xG] with a Gaussian G, one block of columns a factor.

    Args:
        data_rotation: each column of G is the difference of two random vectors of the sequence instead. The
            buckets then follow where the vectors lie, but a token's bucket depends on the other tokens.

    Source: Kitaev, Kaiser, Levskaya 2020, §2 "Locality sensitive hashing"; Andoni et al. 2015. The data
    rotation is that of Trax's configuration for imagenet64.
    """

    data_rotation: bool = False

    @property
    def token_wise(self) -> bool:
        return not self.data_rotation

    def __call__(
        self,
        vectors: Float[Tensor, "batch heads seq dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        self.check(n_buckets)
        columns = signed_axes.n_axes(n_buckets)
        if self.data_rotation:
            rotation = _differences(vectors, n_hashes=n_hashes, columns=columns, generator=generator)
            rotated = torch.einsum("bhld,bhrkd->bhrlk", vectors, rotation)
        else:
            normals = _normals(vectors, n_hashes=n_hashes, columns=columns, generator=generator)
            rotated = torch.einsum("bhld,hdrk->bhrlk", vectors, normals)
        return signed_axes.bucket_ids(rotated, n_buckets=n_buckets)

    def draw(
        self,
        vectors: Float[Tensor, "batch heads any dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> HashFunction:
        if self.data_rotation:
            return super().draw(vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)
        self.check(n_buckets)
        columns = signed_axes.n_axes(n_buckets)
        # One matrix a head, ready for single tokens: rounds side by side.
        matrix = _normals(vectors, n_hashes=n_hashes, columns=columns, generator=generator).flatten(2)

        def rotate_and_compare(
            vectors: Float[Tensor, "batch heads seq dim"], positions: Int[Tensor, "#batch seq"]
        ) -> Int[Tensor, "batch heads n_hashes seq"]:
            rotated = (vectors @ matrix).unflatten(-1, (n_hashes, columns)).transpose(2, 3)
            return signed_axes.bucket_ids(rotated, n_buckets=n_buckets)

        return rotate_and_compare

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check(n_buckets)

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """Exact for Gaussian columns: a two-dimensional integral, multiplied over the factors."""
        if self.data_rotation:
            return None
        return math.prod(_same_signed_axis(x, columns=factor // 2) for factor in buckets.factors(n_buckets))


def _normals(
    vectors: Float[Tensor, "batch heads seq dim"],
    *,
    n_hashes: int,
    columns: int,
    generator: torch.Generator,
) -> Float[Tensor, "heads dim n_hashes columns"]:
    """Gaussian columns, drawn on the CPU in float32 and in this shape: a seed is one rotation everywhere."""
    _, heads, _, dim = vectors.shape
    return torch.randn(heads, dim, n_hashes, columns, generator=generator).to(vectors, non_blocking=True)


def _differences(
    vectors: Float[Tensor, "batch heads seq dim"],
    *,
    n_hashes: int,
    columns: int,
    generator: torch.Generator,
) -> Float[Tensor, "batch heads n_hashes columns dim"]:
    """Differences of two vectors of one sequence, at positions that all batch rows share."""
    batch, heads, seq, dim = vectors.shape
    if seq == 0:
        return vectors.new_zeros(batch, heads, n_hashes, columns, dim)
    first = torch.randint(seq, (heads, n_hashes, columns), generator=generator)
    # Never a whole turn: where there are two tokens, no vector is taken from itself.
    second = (first + torch.randint(1, max(2, seq), first.shape, generator=generator)) % seq
    head = torch.arange(heads)[:, None, None]
    return vectors[:, head, second] - vectors[:, head, first]


def _same_signed_axis(angle: float, *, columns: int) -> float:
    """P(two unit vectors at `angle` have the same largest of `columns` Gaussian projections, with its sign).

    One column wins for both, with projections a and b, if |A| < a and |B| < b on every other column, so
    P = 2·n·∫∫_{a,b>0} φ_ρ(a, b)·P(|A| < a, |B| < b)^(n−1), ρ = cos(angle). In polar coordinates of the plane
    that the two vectors span nothing is narrow, however small the angle: a = r·cos(ψ + θ/2),
    b = r·cos(ψ − θ/2), and |A| < a, |B| < b is a parallelogram whose edge is r·edge(ψ, φ) away towards φ.
    """
    if columns == 1:
        return 1 - angle / math.pi
    half = angle / 2
    radius = _midpoints(64, limit=9.0)[:, None, None]
    psi = _midpoints(64, limit=math.pi / 2 - half)[:, None]
    phi = _midpoints(384, limit=math.pi)
    edge = torch.minimum(
        torch.cos(psi + half) / torch.cos(phi + half).abs(),
        torch.cos(psi - half) / torch.cos(phi - half).abs(),
    )
    both_smaller = 1 - torch.exp(-(radius * edge).square() / 2).mean(dim=-1)
    density = (radius * torch.exp(-radius.square() / 2)).squeeze(-1) * (9.0 / 64)
    mass = (density * both_smaller.pow(columns - 1)).sum(dim=0).mean()
    return min(1.0, float(columns * (1 - angle / math.pi) * mass))


def _midpoints(cells: int, *, limit: float) -> Float[Tensor, " cells"]:
    return (torch.arange(cells, dtype=torch.float64) + 0.5) * (limit / cells)
