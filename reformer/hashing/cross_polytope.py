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


def _same_signed_axis(angle: float, *, columns: int, steps: int = 2048, limit: float = 8.0) -> float:
    """P(two unit vectors at `angle` have the same largest of `columns` Gaussian projections, with its sign).

    The projections on one column are bivariate normal with correlation ρ = cos(angle). One column wins for
    both at (a, b) if every other lies in |A| < a, |B| < b, so
    P = 2·n·∫∫_{a,b>0} φ_ρ(a, b)·P(|A| < a, |B| < b)^(n−1).
    """
    correlation = math.cos(angle)
    spread = math.sqrt(max(0.0, 1.0 - correlation**2))
    if spread < 1e-6:
        return 1.0 if correlation > 0 else 0.0
    axis = (torch.arange(steps, dtype=torch.float64) + 0.5) * (limit / steps)
    cell = limit / steps
    density = torch.exp(-axis.square() / 2) / math.sqrt(2 * math.pi)
    a, b = axis[:, None], axis[None, :]
    inside = _normal_cdf((b - correlation * a) / spread) - _normal_cdf((-b - correlation * a) / spread)
    mass = 2 * density[:, None] * inside * cell
    both_smaller = (mass.cumsum(0) - mass / 2).clamp(0, 1)
    joint = (density[:, None] / spread) * torch.exp(-(((b - correlation * a) / spread).square()) / 2)
    joint = joint / math.sqrt(2 * math.pi)
    return float(2 * columns * (joint * both_smaller.pow(columns - 1)).sum() * cell**2)


def _normal_cdf(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    below: Tensor = torch.special.ndtr(x)
    return below
