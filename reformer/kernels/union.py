"""LSH attention on an accelerator: rounds sorted there, and one autograd function over a kernel.

Combining rounds by their log-sum-exp is one softmax over everything that any round shows. So backward needs,
beside inputs and output, only that total log-sum-exp and the order of each round, one integer a token.
Nothing here waits for the device: what is known there alone stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.kernels.flash import Pattern, Twin

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
            positions, starts = read(self.order[:, :, part])
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
    """Who looks at the pairs.

    Args:
        forward: of qk, v and the rounds, makes the output and, for backward, a number a row.
        backward: of those, and `out`, `logsumexp` and `dout` by name, makes the gradients of qk and v.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor]]


def attend(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    buckets: Int[Tensor, "batch heads rounds seq"],
    padding_mask: Bool[Tensor, "batch seq"] | None,
    pattern: Pattern,
    twin: Twin,
    kernel: Kernel,
) -> Float[Tensor, "batch heads seq value"]:
    """LSH attention on given buckets: a query attends to itself only where nothing else is left.

    Args:
        qk: shared queries and keys, unnormalised.
        v: values.
        buckets: bucket ids.
        padding_mask: True at real tokens; outputs elsewhere are 0.
        pattern: which keys a query meets.
        twin: the same function, dropout aside, for whoever differentiates twice; it must hold no tensor.
        kernel: who looks at the pairs.
    """
    seed = int(torch.randint(2**62, ())) if pattern.dropout_p else 0
    out: Tensor = _Union.apply(qk, v, buckets, padding_mask, pattern, seed, twin, kernel)  # type: ignore[no-untyped-call]
    return out


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        buckets: Tensor,
        real: Tensor | None,
        pattern: Pattern,
        seed: int,
        twin: Twin,
        kernel: Kernel,
    ) -> Tensor:
        with torch.autocast(qk.device.type, enabled=False):
            rounds = Rounds(order=sort(buckets, real=real), real=real, pattern=pattern, seed=seed)
            out, logsumexp = kernel.forward(qk, v, rounds)
        ctx.save_for_backward(qk, v, out, logsumexp, rounds.order, real)
        ctx.pattern, ctx.seed, ctx.twin, ctx.kernel = pattern, seed, twin, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, out, logsumexp, order, real = ctx.saved_tensors
        if torch.is_grad_enabled():
            # Somebody wants to differentiate these gradients.
            if ctx.pattern.dropout_p:
                raise RuntimeError("second derivatives under attention dropout need backend='reference'")
            inputs = [x for x in (qk, v) if x.requires_grad]
            again = ctx.twin(qk, v, buckets=ranks(order), padding_mask=real)
            found = iter(torch.autograd.grad(again, inputs, gradients[0], create_graph=True))
            return *(next(found) if x.requires_grad else None for x in (qk, v)), *[None] * 6
        with torch.autocast(qk.device.type, enabled=False):
            rounds = Rounds(order=order, real=real, pattern=ctx.pattern, seed=ctx.seed)
            dqk, dv = ctx.kernel.backward(qk, v, rounds, out=out, logsumexp=logsumexp, dout=gradients[0])
        return dqk, dv, *[None] * 6


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


def read(order: Int[Tensor, "*outer seq"]) -> tuple[Int[Tensor, "*outer seq"], Bool[Tensor, "*outer seq"]]:
    """Positions in their order, and where a bucket starts."""
    starts = order < 0
    return torch.where(starts, ~order, order).long(), starts


def ranks(order: Int[Tensor, "*outer seq"]) -> Int[Tensor, "*outer seq"]:
    """Bucket ids by position that are sorted like those that made this order."""
    positions, starts = read(order)
    return torch.empty_like(positions).scatter_(-1, positions, starts.cumsum(-1))


def beside(x: Float[Tensor, "batch heads seq any"], *, dtype: torch.dtype) -> Tensor:
    """Room for as much, heads beside each other in memory as a projection wants them."""
    batch, heads, seq, dim = x.shape
    return x.new_empty(batch, seq, heads, dim, dtype=dtype).transpose(1, 2)


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
