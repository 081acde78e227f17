"""Bit sampling: the LSH of the Hamming distance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import bits, buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily


@dataclass(frozen=True, kw_only=True)
class BitSampling(HashFamily):
    """Bucket = the signs of log₂(n_buckets) distinct random coordinates, read as a binary number.

    Source: Indyk, Motwani 1998, "Approximate nearest neighbors: towards removing the curse of
    dimensionality".
    """

    distance: ClassVar[str] = "flip_rate"

    def __call__(
        self,
        vectors: Float[Tensor, "batch heads seq dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        _, heads, _, dim = vectors.shape
        self.check(n_buckets, dim=dim)
        positions = bits.distinct_positions(
            heads, n_hashes, dim=dim, count=buckets.bits(n_buckets), generator=generator
        )
        positive = vectors[:, :, None] > 0
        places = positions.to(vectors.device, non_blocking=True)[None, :, :, None]
        return bits.as_number(torch.take_along_dim(positive, places, dim=-1))

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check_power_of_two(n_buckets, family="bit_sampling")
        if dim is not None and buckets.bits(n_buckets) > dim:
            raise ValueError(
                f"n_buckets={n_buckets}: the bit_sampling family takes {buckets.bits(n_buckets)} distinct "
                f"coordinates, and vectors have {dim}; use {2**dim} or fewer, or larger heads"
            )

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """(1 − δ)^bits: C(dim − t, bits)/C(dim, bits) for t flips, averaged over t ~ Binom(dim, δ)."""
        return float((1 - x) ** buckets.bits(n_buckets))
