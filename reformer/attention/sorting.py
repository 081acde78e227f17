"""Sorting tokens by bucket, a round at a time, and moving rows along such a sort."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class SortOrder:
    """A permutation of the sequence for every round, sorted by (bucket, position).

    Args:
        positions: position of the token in each slot of the sorted order.
        slots: its inverse, the slot of each position.
    """

    positions: Int[Tensor, "batch heads rounds seq"]
    slots: Int[Tensor, "batch heads rounds seq"]


def sort_by_bucket(buckets: Int[Tensor, "batch heads rounds seq"]) -> SortOrder:
    """Sort each round by (bucket, position).

    A stable sort of the ids alone: a combined key bucket·seq + position would overflow 32 bits on long
    sequences.
    """
    positions = torch.sort(buckets, dim=-1, stable=True).indices
    every = torch.arange(buckets.shape[-1], device=buckets.device).expand_as(positions)
    slots = torch.empty_like(positions).scatter_(-1, positions, every)
    return SortOrder(positions, slots)


def sort_rows(
    x: Float[Tensor, "batch heads seq dim"], order: SortOrder
) -> Float[Tensor, "batch heads rounds seq dim"]:
    """Copy the rows into the sorted order of every round."""
    sorted_rows: Tensor = _SortRows.apply(x, order.positions, order.slots)  # type: ignore[no-untyped-call]
    return sorted_rows


def unsort_rows(
    x: Float[Tensor, "batch heads rounds seq dim"], order: SortOrder
) -> Float[Tensor, "batch heads rounds seq dim"]:
    """Move the rows of every round back to their positions."""
    unsorted_rows: Tensor = _UnsortRows.apply(x, order.positions, order.slots)  # type: ignore[no-untyped-call]
    return unsorted_rows


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(3, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))


class _SortRows(torch.autograd.Function):
    """Gather by a permutation; the gradient gathers by its inverse, where autograd would scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(positions, slots)
        return _gather(x.unsqueeze(2).expand(-1, -1, positions.shape[2], -1, -1), positions)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        positions, slots = ctx.saved_tensors
        return unsort_rows(gradients[0], SortOrder(positions, slots)).sum(dim=2), None, None


class _UnsortRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(positions, slots)
        return _gather(x, slots)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        positions, slots = ctx.saved_tensors
        # Moving back along a permutation is moving along its inverse.
        return unsort_rows(gradients[0], SortOrder(slots, positions)), None, None
