"""The interface of a hash family: vectors in, bucket ids out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing.buckets import Buckets


@dataclass(frozen=True, kw_only=True)
class HashFamily(ABC):
    """A locality-sensitive hash family, *token-wise*: a token's bucket depends on that token alone.

    To add one, write a frozen dataclass in a file of its own under `reformer/hashing/` and a yaml of the
    same name under `conf/hashing/` whose `_target_` is the class.
    """

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
        """

    def check(self, n_buckets: Buckets) -> None:  # noqa: B027 (a family may take any count)
        """Refuse bucket counts that the family cannot make.

        Raises:
            ValueError: names the value, the rule and the mend.
        """

    @abstractmethod
    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """Chance that two vectors share a bucket in one round; None where no closed form is known.

        Args:
            x: the angle between the vectors in radians.
            n_buckets: buckets a round.
            dim: length of the vectors.
        """
