"""The floor of every hash ablation: buckets that know nothing of the vectors."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily, HashFunction


@dataclass(frozen=True, kw_only=True)
class Random(HashFamily):
    """Bucket = a counter-based hash of (seed, head, round, position); never of content, row or length."""

    def __call__(
        self,
        vectors: Float[Tensor, "batch heads seq dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        hash_function = self.draw(vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)
        return hash_function(vectors, torch.arange(vectors.shape[2], device=vectors.device)[None])

    def draw(
        self,
        vectors: Float[Tensor, "batch heads any dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> HashFunction:
        self.check(n_buckets)
        heads, device = vectors.shape[1], vectors.device
        seed = int(torch.randint(2**62, (), generator=generator))
        keys = _mix(torch.arange(heads, device=device)[:, None, None] + seed)
        keys = _mix(keys ^ torch.arange(n_hashes, device=device)[None, :, None])

        def hash_positions(
            vectors: Float[Tensor, "batch heads seq dim"], positions: Int[Tensor, "#batch seq"]
        ) -> Int[Tensor, "batch heads n_hashes seq"]:
            mixed = _mix(keys ^ positions[:, None, None, :])
            ids = (mixed & (2**62 - 1)) % buckets.total(n_buckets)
            return ids.expand(vectors.shape[0], heads, n_hashes, vectors.shape[2])

        return hash_positions

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check(n_buckets)

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """1 / n_buckets at any distance."""
        return 1 / buckets.total(n_buckets)


def _mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The finaliser of SplitMix64 on wrapping 64-bit integers: every input bit moves every output bit."""
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    """Logical right shift; torch's own copies the sign bit."""
    return (x >> bits) & ((1 << 64 - bits) - 1)
