"""Quantising to the nearest codeword: neighbours share it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import bits, buckets, signed_axes
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily
from reformer.hashing.walsh_hadamard import walsh_hadamard


@dataclass(frozen=True, kw_only=True)
class Codeword(HashFamily):
    """Bucket = the nearest word, by Hamming distance, of a first-order Reed–Muller code to the signs.

    The code of length B/2 has B words. It sees the signs of B/2 distinct random coordinates; ties go to the
    lowest id. Of word i < B/2 the bit at place j is the parity of i & j, and word i + B/2 is its complement.
    A factorised count takes a code and coordinates of its own for each factor, and so fewer of them. With
    two or four buckets a factor every word is a codeword, and this is bit sampling.

    Source: MacWilliams, Sloane 1977, ch. 14, on decoding by the Hadamard transform.
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
            heads, n_hashes, dim=dim, count=signed_axes.n_axes(n_buckets), generator=generator
        )
        places = positions.to(vectors.device, non_blocking=True)[None, :, :, None]
        positive = torch.take_along_dim(vectors[:, :, None] > 0, places, dim=-1)
        # A word's distance is (length − correlation)/2, so the nearest one correlates most. In float32 the
        # correlations are whole numbers, and ties are ties.
        received = 1.0 - 2.0 * positive.float()
        words = [walsh_hadamard(part) for part in received.split(signed_axes.halves(n_buckets), dim=-1)]
        return signed_axes.bucket_ids(torch.cat(words, dim=-1), n_buckets=n_buckets)

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check_power_of_two(n_buckets, family="codeword")
        needed = signed_axes.n_axes(n_buckets)
        if dim is not None and needed > dim:
            raise ValueError(
                f"n_buckets={n_buckets}: the codeword family takes {needed} distinct coordinates, half of "
                f"each factor, and vectors have {dim}; use {2 ** dim.bit_length()} or fewer, a pair of "
                "factors, or larger heads"
            )

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """None: it would be a sum over pairs of cosets."""
        return None
