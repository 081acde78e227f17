"""The interface of a hash family: vectors in, bucket ids out."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing.buckets import Buckets

#: One draw of a family: from vectors, and where each stands in its sequence, to bucket ids.
HashFunction = Callable[
    [Float[Tensor, "batch heads seq dim"], Int[Tensor, "#batch seq"]],
    Int[Tensor, "batch heads n_hashes seq"],
]


@dataclass(frozen=True, kw_only=True)
class HashFamily(ABC):
    """A locality-sensitive hash family.

    To add one, write a frozen dataclass in a file of its own under `reformer/hashing/` and a yaml of the
    same name under `conf/hashing/` whose `_target_` is the class.
    """

    #: How far apart vectors are for this family: `angle` in radians, or `flip_rate`, the chance of each
    #: coordinate's sign to differ, independent of the others.
    distance: ClassVar[str] = "angle"

    @property
    def token_wise(self) -> bool:
        """Whether a token's bucket depends on that token alone, which strict causality rests on."""
        return True

    @abstractmethod
    def __call__(
        self,
        vectors: Float[Tensor, "batch heads seq dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        """Hash every vector once a round; ids are in `[0, total(n_buckets))`.

        Args:
            vectors: unnormalised, detached; hashed in float32, or float64 if they are.
            n_hashes: hash rounds, each drawn on its own.
            n_buckets: buckets a round; a pair is a factorised count.
            generator: a CPU generator, the only source of randomness.

        Raises:
            ValueError: what `check` raises.
        """

    def draw(
        self,
        vectors: Float[Tensor, "batch heads any dim"],
        *,
        n_hashes: int,
        n_buckets: Buckets,
        generator: torch.Generator,
    ) -> HashFunction:
        """What a call with this generator hashes by, for tokens that come a few at a time.

        Families that cost more to draw than to apply, or that look at positions, have a draw of their own.

        Args:
            vectors: such as will be hashed: their heads, width, type and device count, not their values.
            n_hashes: hash rounds, each drawn on its own.
            n_buckets: buckets a round; a pair is a factorised count.
            generator: a CPU generator, the only source of randomness.

        Raises:
            ValueError: a family whose buckets depend on other tokens, or what `check` raises.
        """
        if not self.token_wise:
            raise ValueError(
                f"hashing={self}: a bucket depends on the other tokens, so tokens cannot come one by one; "
                "use a token-wise family (data_rotation=False)"
            )
        start = generator.get_state()

        def draw_again(
            vectors: Float[Tensor, "batch heads seq dim"], positions: Int[Tensor, "#batch seq"]
        ) -> Int[Tensor, "batch heads n_hashes seq"]:
            again = torch.Generator()
            again.set_state(start)
            return self(vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=again)

        return draw_again

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:  # noqa: B027 (takes any count)
        """Refuse bucket counts that the family cannot make.

        Args:
            n_buckets: buckets a round.
            dim: length of the vectors, where it is known.

        Raises:
            ValueError: names the value, the rule and the mend.
        """

    @abstractmethod
    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """Chance that two vectors share a bucket in one round; None where no closed form is known.

        Args:
            x: how far apart the vectors are, in the measure that `distance` names.
            n_buckets: buckets a round.
            dim: length of the vectors.
        """
