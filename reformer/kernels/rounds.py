"""LSH attention on an accelerator: rounds sorted there, and what kernels ask of them.

Nothing here waits for the device: what is known there alone stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.kernels.union import Attended, Pattern, read_order

#: Entries that are sorted in one call, unless a round alone has more: a call a round would keep a device
#: waiting where rounds are short, and where they are long would need memory for all of them.
TOGETHER = 2**22
#: 32-bit codes stay below.
_NARROW = 2**30
#: Farther from any code than two codes are from each other.
_HIDDEN = {torch.int32: -(2**30), torch.int64: -(2**60)}


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The sorted order of every round, and which pairs it shows.

    Args:
        order: position of each slot, ~position where a bucket starts.
        real: True at real tokens; None if all are.
        pattern: which keys a query meets.
        seed: of the dropped weights.
    """

    order: Int[Tensor, "batch heads rounds seq"]
    real: Bool[Tensor, "batch seq"] | None
    pattern: Pattern
    seed: int

    @property
    def code_type(self) -> torch.dtype:
        """The narrowest type that holds all codes."""
        largest = self.order.shape[-1] * (self.pattern.span[1] + 2)
        return torch.int32 if largest < _NARROW else torch.int64

    @property
    def hidden(self) -> int:
        """The code of a key that no query sees."""
        return _HIDDEN[self.code_type]

    def codes(self) -> Int[Tensor, "rounds batch heads seq"]:
        """One integer a token and round, by position: a query sees a key if their difference is in the span.

        Strict, slot + rank of the bucket·(band + 1): pairs of unequal buckets differ by more than the band,
        and a later slot of the same bucket is a later position. Else the chunk, and of padding `hidden`;
        positions decide the rest.
        """
        batch, heads, rounds, seq = self.order.shape
        slots = torch.arange(seq, dtype=self.code_type, device=self.order.device)
        codes = slots.new_empty(rounds, batch, heads, seq)
        for part in _together(self.order):
            positions, starts = read_order(self.order[:, :, part])
            if self.pattern.strict:
                values = starts.cumsum(-1, dtype=self.code_type) * (self.pattern.span[1] + 1) + slots
            else:
                values = (slots // self.pattern.chunk_length).expand_as(positions)
                if self.real is not None:
                    real = self.real[:, None, None].expand_as(positions).gather(-1, positions)
                    values = values.where(real, self.hidden)
            codes[part].permute(1, 2, 0, 3).scatter_(-1, positions, values)
        return codes


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An engine (`reformer.kernels.union.Engine`) of two functions that look at the pairs of given rounds.

    Args:
        attend: of qk, v and the rounds, makes the output and, for backward, a number a row.
        differentiate: of those, and `out`, `logsumexp` and `dout` by name, makes the gradients of qk and v.
    """

    attend: Callable[..., tuple[Tensor, Tensor]]
    differentiate: Callable[..., tuple[Tensor, Tensor]]

    def forward(
        self,
        qk: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq value"],
        *,
        buckets: Int[Tensor, "batch heads rounds seq"],
        real: Bool[Tensor, "batch seq"] | None,
        pattern: Pattern,
        seed: int,
    ) -> Attended:
        rounds = Rounds(order=sort(buckets, real=real), real=real, pattern=pattern, seed=seed)
        return Attended(*self.attend(qk, v, rounds), rounds.order)

    def backward(
        self,
        qk: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq value"],
        attended: Attended,
        *,
        dout: Float[Tensor, "batch heads seq value"],
        real: Bool[Tensor, "batch seq"] | None,
        pattern: Pattern,
        seed: int,
    ) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq value"]]:
        rounds = Rounds(order=attended.order, real=real, pattern=pattern, seed=seed)
        return self.differentiate(qk, v, rounds, out=attended.out, logsumexp=attended.logsumexp, dout=dout)


def sort(
    buckets: Int[Tensor, "batch heads rounds seq"], *, real: Bool[Tensor, "batch seq"] | None
) -> Int[Tensor, "batch heads rounds seq"]:
    """Positions of each round by (bucket, position), padding last; ~position where a bucket starts."""
    order = torch.empty(buckets.shape, dtype=torch.int32, device=buckets.device)
    for part in _together(buckets):
        ids = buckets[:, :, part]
        if real is not None:
            # Padding has a bucket of its own, after all others.
            ids = torch.where(real[:, None, None], ids, ids.max() + 1)
        ids, positions = torch.sort(ids, dim=-1, stable=True)
        starts = torch.ones_like(ids, dtype=torch.bool)
        torch.ne(ids[..., 1:], ids[..., :-1], out=starts[..., 1:])
        order[:, :, part] = torch.where(starts, ~positions, positions)
    return order


def key_norms(
    qk: Float[Tensor, "batch heads seq dim"], *, pattern: Pattern, dtype: torch.dtype
) -> Float[Tensor, "batch heads seq"]:
    """By what queries are multiplied to make keys of length √dim."""
    length: Tensor = torch.linalg.vector_norm(qk, dim=-1, dtype=dtype)
    return length.square_().div_(qk.shape[-1]).add_(pattern.epsilon).rsqrt_().contiguous()


def _together(x: Int[Tensor, "batch heads rounds seq"]) -> Iterator[slice]:
    """Rounds, some at a time."""
    batch, heads, rounds, seq = x.shape
    step = max(1, TOGETHER // max(1, batch * heads * seq))
    return (slice(first, first + step) for first in range(0, rounds, step))
