"""The paper's hash family: the nearest signed axis after a random rotation."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily


@dataclass(frozen=True, kw_only=True)
class CrossPolytope(HashFamily):
    """Bucket = argmax of [xG, −xG] with a Gaussian G, one block of columns a factor.

    Source: Kitaev, Kaiser, Levskaya 2020, §2 "Locality sensitive hashing"; Andoni et al. 2015.
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
        halves = [factor // 2 for factor in buckets.factors(n_buckets)]
        _, heads, _, dim = vectors.shape
        # Drawn on the CPU in float32 and in this shape, so that a seed names one rotation everywhere.
        rotation = torch.randn(heads, dim, n_hashes, sum(halves), generator=generator)
        rotated = torch.einsum("bhld,hdrk->bhrlk", vectors, rotation.to(vectors))
        ids = torch.zeros(rotated.shape[:-1], dtype=torch.int64, device=vectors.device)
        stride = 1
        for half, block in zip(halves, rotated.split(halves, dim=-1), strict=True):
            ids += stride * nearest_signed_axis(block)
            stride *= 2 * half
        return ids

    def check(self, n_buckets: Buckets) -> None:
        buckets.check(n_buckets)

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """Exact for Gaussian columns: a two-dimensional integral, multiplied over the factors."""
        return math.prod(_same_signed_axis(x, columns=factor // 2) for factor in buckets.factors(n_buckets))


def nearest_signed_axis(rotated: Float[Tensor, "*rows half"]) -> Int[Tensor, "*rows"]:
    """argmax over [p, −p] without building it; ties go to the positive side."""
    highest, positive = rotated.max(dim=-1)
    lowest, negative = rotated.min(dim=-1)
    return torch.where(highest >= -lowest, positive, negative + rotated.shape[-1])


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
