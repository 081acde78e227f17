"""From coordinates to buckets: the nearest signed axis, one block of coordinates a factor."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from reformer.hashing import buckets
from reformer.hashing.buckets import Buckets
from reformer.kernels import native


def halves(n_buckets: Buckets) -> list[int]:
    """Coordinates that each factor needs: half of it, since an axis has two signs."""
    return [factor // 2 for factor in buckets.factors(n_buckets)]


def n_axes(n_buckets: Buckets) -> int:
    """Coordinates that a count needs over all factors."""
    return sum(halves(n_buckets))


def bucket_ids(coordinates: Float[Tensor, "*rows axes"], *, n_buckets: Buckets) -> Int[Tensor, "*rows"]:
    """The nearest signed axis of each factor's block, as digits of a number, the first factor fastest."""
    first, *others = coordinates.split(halves(n_buckets), dim=-1)
    ids, stride = nearest_signed_axis(first), 2 * first.shape[-1]
    for block in others:
        ids = ids.add(nearest_signed_axis(block), alpha=stride)
        stride *= 2 * block.shape[-1]
    return ids


def nearest_signed_axis(coordinates: Float[Tensor, "*rows half"]) -> Int[Tensor, "*rows"]:
    """argmax over [p, −p] without building it; ties go to the lowest id."""
    if _by_kernel(coordinates):
        return native.nearest_signed_axis(coordinates)
    highest, positive = coordinates.max(dim=-1)
    lowest, negative = coordinates.min(dim=-1)
    return torch.where(highest >= -lowest, positive, negative + coordinates.shape[-1])


def _by_kernel(coordinates: Tensor) -> bool:
    if coordinates.dtype != torch.float32 or coordinates.device.type != "cpu":
        return False
    return not torch.compiler.is_compiling() and not native.missing()
