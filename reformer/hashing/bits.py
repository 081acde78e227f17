"""Codes of bits: coordinates to choose, bits to ids, and how many of them flip."""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def distinct_positions(
    *shape: int, dim: int, count: int, generator: torch.Generator
) -> Int[Tensor, "*shape count"]:
    """For each place of `shape`, `count` of the `dim` coordinates, all different, in random order."""
    # A stable sort, so that two equal keys are in the same order on every machine.
    return torch.rand(*shape, dim, generator=generator).argsort(dim=-1, stable=True)[..., :count]


def as_number(bits: Bool[Tensor, "*rows bits"]) -> Int[Tensor, "*rows"]:
    """Bits as a binary number, the first one the least."""
    weights = 2 ** torch.arange(bits.shape[-1], device=bits.device)
    return (bits * weights).sum(dim=-1)


def flip_counts(dim: int, *, flip_rate: float) -> list[float]:
    """P(t of `dim` bits differ) for t = 0 … dim, when each differs on its own: a binomial distribution."""
    if flip_rate in (0.0, 1.0):
        return [float(count == flip_rate * dim) for count in range(dim + 1)]
    # In logarithms: the coefficients of long vectors are beyond a float.
    return [
        math.exp(
            math.lgamma(dim + 1)
            - math.lgamma(count + 1)
            - math.lgamma(dim - count + 1)
            + count * math.log(flip_rate)
            + (dim - count) * math.log1p(-flip_rate)
        )
        for count in range(dim + 1)
    ]
