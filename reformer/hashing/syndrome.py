"""Syndromes of a random binary code: an LSH if the parity checks are sparse, the opposite if dense."""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.hashing import bits, buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily


@dataclass(frozen=True, kw_only=True)
class Syndrome(HashFamily):
    """Bucket = H·b over 𝔽₂, b the signs of the vector, H log₂(n_buckets) random parity checks.

    With one coordinate a check this is bit sampling with replacement. With dense checks buckets are the
    cosets of a random code, as in Slepian–Wolf binning: a single flip moves a vector to an unrelated
    bucket, so neighbours are kept *apart*. `Codeword` is the use of a code that brings them together.

    Args:
        row_weight: coordinates in each check; None is half of them, rounded up.

    Source: Wyner 1974, "Recent results in the Shannon theory", on syndromes as bins.
    """

    distance: ClassVar[str] = "flip_rate"
    row_weight: int | None = None

    def __post_init__(self) -> None:
        if self.row_weight is not None and self.row_weight < 1:
            raise ValueError(
                f"row_weight={self.row_weight}: a parity check has one coordinate at least; "
                "use row_weight=1 or more, or None for half of them"
            )

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
        checks = parity_checks(
            heads,
            n_hashes,
            buckets.bits(n_buckets),
            dim=dim,
            row_weight=self._weight(dim),
            generator=generator,
        )
        # Counts are exact in float32, whose products are faster than those of integers.
        positive = (vectors > 0).float()
        counts = torch.einsum("bhld,hrkd->bhrlk", positive, checks.to(positive, non_blocking=True))
        return bits.as_number(counts % 2 == 1)

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check_power_of_two(n_buckets, family="syndrome")
        if dim is not None and self._weight(dim) > dim:
            raise ValueError(
                f"row_weight={self.row_weight}: a parity check takes distinct coordinates, and vectors have "
                f"{dim}; use row_weight={dim} or less, or None for half of them"
            )

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """Σ_t Binom(dim, δ)(t)·((1 + κ(t))/2)^bits, κ(t) = K_w(t)/C(dim, w).

        A check keeps its value if an even number of its coordinates flip. All checks see the same t flips,
        so their chances multiply for a given t only.
        """
        balance = even_minus_odd(dim, row_weight=self._weight(dim))
        n_checks = buckets.bits(n_buckets)
        return sum(
            chance * ((1 + kept) / 2) ** n_checks
            for chance, kept in zip(bits.flip_counts(dim, flip_rate=x), balance, strict=True)
        )

    def _weight(self, dim: int) -> int:
        return self.row_weight if self.row_weight is not None else -(-dim // 2)


def parity_checks(
    *shape: int, dim: int, row_weight: int, generator: torch.Generator
) -> Bool[Tensor, "*shape dim"]:
    """For each place of `shape` a row with exactly `row_weight` ones, drawn on its own."""
    ones = bits.distinct_positions(*shape, dim=dim, count=row_weight, generator=generator)
    return torch.zeros(*shape, dim, dtype=torch.bool).scatter_(-1, ones, True)


def even_minus_odd(dim: int, *, row_weight: int) -> list[float]:
    """κ(t) for t = 0 … dim: the chance that a random row meets t given coordinates an even number of times,
    less that of an odd one.

    It is the Krawtchouk polynomial K_w(t)/C(dim, w) and obeys (dim − t)·κ(t + 1) = (dim − 2w)·κ(t) −
    t·κ(t − 1); in fractions, as rounding errors would grow along the recurrence.
    """
    values = [Fraction(1)]
    for t in range(dim):
        before = t * values[t - 1] if t else 0
        values.append(((dim - 2 * row_weight) * values[t] - before) / (dim - t))
    return [float(value) for value in values]
