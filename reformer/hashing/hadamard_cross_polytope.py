"""The cross-polytope family with a pseudo-random rotation that costs O(dim·log dim)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import buckets, signed_axes
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily
from reformer.hashing.walsh_hadamard import walsh_hadamard


@dataclass(frozen=True, kw_only=True)
class HadamardCrossPolytope(HashFamily):
    """Bucket = argmax of [p, −p], p the first coordinates of HD₃HD₂HD₁x, one block of them a factor.

    H is the Hadamard matrix, the D are diagonals of random signs. Vectors are padded with zeros to a power
    of two; where a count needs more coordinates than that, further rotations supply them.

    Source: Andoni, Indyk, Laarhoven, Razenshteyn, Schmidt 2015, "Practical and optimal LSH for angular
    distance", on pseudo-random rotations.
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
        axes = signed_axes.n_axes(n_buckets)
        _, heads, _, dim = vectors.shape
        size = 1 << (dim - 1).bit_length()
        signs = random_signs(3, heads, n_hashes, -(-axes // size), size, generator=generator)
        padded = F.pad(vectors, (0, size - dim))
        rotated = pseudo_rotate(
            padded[:, :, None, None], signs.to(vectors, non_blocking=True)[:, :, :, :, None]
        )
        coordinates = rotated.transpose(3, 4).flatten(4)[..., :axes]
        return signed_axes.bucket_ids(coordinates, n_buckets=n_buckets)

    def check(self, n_buckets: Buckets, *, dim: int | None = None) -> None:
        buckets.check(n_buckets)

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        """None; close to the cross polytope's."""
        return None


def pseudo_rotate(
    x: Float[Tensor, "*#rows size"], signs: Float[Tensor, "stages *#rows size"]
) -> Float[Tensor, "*rows size"]:
    """For each stage in turn, flip signs and apply the orthonormal Hadamard matrix."""
    for flips in signs:
        x = walsh_hadamard(x * flips) * x.shape[-1] ** -0.5
    return x


def random_signs(*shape: int, generator: torch.Generator) -> Float[Tensor, "*shape"]:
    """+1 or −1, equally likely."""
    return torch.randint(2, shape, generator=generator) * 2.0 - 1.0
