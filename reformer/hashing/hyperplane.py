"""Sign random projections (SimHash): one bit a hyperplane."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import bits, buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily


@dataclass(frozen=True, kw_only=True)
class Hyperplane(HashFamily):
    """Bucket = the signs of log₂(n_buckets) Gaussian projections, read as a binary number.

    Source: Charikar 2002, "Similarity estimation techniques from rounding algorithms".
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
        normals = torch.randn(heads, dim, n_hashes, buckets.bits(n_buckets), generator=generator)
        return bits.as_number(
            torch.einsum("bhld,hdrk->bhrlk", vectors, normals.to(vectors, non_blocking=True)) > 0
        )

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check_power_of_two(n_buckets, family="hyperplane")

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """(1 − θ/π)^bits."""
        return float((1 - x / math.pi) ** buckets.bits(n_buckets))
