"""One softmax over all rounds, whoever computes it, and its derivatives.

Combining rounds by their log-sum-exp is one softmax over everything that any round shows. So backward needs,
beside inputs and output, only that total log-sum-exp and the order of each round. It looks at pairs again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: Of qk and v, with `buckets` and `padding_mask`.
Twin = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which keys a query meets, and how they count.

    Args:
        chunk_length: slots a chunk.
        before: earlier chunks that a chunk sees.
        after: later ones.
        strict: a query sees the last `before` chunks' worth of slots of its own bucket; else chunk windows.
        causal: it sees no later position.
        count: a pair counts once however many rounds show it; else once a round.
        scale: what keys are multiplied by after they have length √dim.
        epsilon: what is added to the mean square of a query that makes a key.
        dropout_p: share of weights dropped.
    """

    chunk_length: int
    before: int
    after: int
    strict: bool
    causal: bool
    count: bool
    scale: float
    epsilon: float
    dropout_p: float = 0.0

    @property
    def views(self) -> int:
        """Chunks that a chunk sees, its own among them."""
        return self.before + 1 + self.after

    @property
    def span(self) -> tuple[int, int]:
        """Smallest and largest difference of codes, query minus key, that is visible."""
        return (1, self.before * self.chunk_length) if self.strict else (-self.after, self.before)


class Attended(NamedTuple):
    """What forward found, all that backward needs beside its inputs.

    Args:
        out: the weighted values.
        logsumexp: of all the pairs that a query sees, to the base 2; huge where it sees only itself.
        order: positions in the order of each round, ~position where a bucket starts.
    """

    out: Float[Tensor, "batch heads seq value"]
    logsumexp: Float[Tensor, "batch heads seq"]
    order: Int[Tensor, "batch heads rounds seq"]


@runtime_checkable
class Engine(Protocol):
    """Who computes it: a module with these two functions. `seed` is that of dropout."""

    def forward(
        self,
        qk: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq value"],
        *,
        buckets: Int[Tensor, "batch heads rounds seq"],
        real: Bool[Tensor, "batch seq"] | None,
        pattern: Pattern,
        seed: int,
    ) -> Attended: ...

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
    ) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq value"]]: ...


def attend(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    buckets: Int[Tensor, "batch heads rounds seq"],
    padding_mask: Bool[Tensor, "batch seq"] | None,
    pattern: Pattern,
    engine: Engine,
    twin: Twin,
) -> Float[Tensor, "batch heads seq value"]:
    """LSH attention on given buckets: a query attends to itself only where nothing else is left.

    Args:
        qk: shared queries and keys, unnormalised.
        v: values.
        buckets: bucket ids.
        padding_mask: True at real tokens; outputs elsewhere are 0.
        pattern: which keys a query meets.
        engine: who computes it.
        twin: the same function, dropout aside, for whoever differentiates twice; it must hold no tensor.
    """
    seed = int(torch.randint(2**62, ())) if pattern.dropout_p else 0
    out: Tensor = _Attend.apply(qk, v, buckets, padding_mask, pattern, seed, engine, twin)  # type: ignore[no-untyped-call]
    return out


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qk: Tensor,
        v: Tensor,
        buckets: Tensor,
        real: Tensor | None,
        pattern: Pattern,
        seed: int,
        engine: Engine,
        twin: Twin,
    ) -> Tensor:
        with torch.autocast(qk.device.type, enabled=False):
            found = engine.forward(qk, v, buckets=buckets, real=real, pattern=pattern, seed=seed)
        ctx.save_for_backward(qk, v, real, *found)
        ctx.pattern, ctx.seed, ctx.engine, ctx.twin = pattern, seed, engine, twin
        return found.out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, real, *found = ctx.saved_tensors
        attended = Attended(*found)
        if torch.is_grad_enabled():
            # Somebody wants to differentiate these gradients.
            if ctx.pattern.dropout_p:
                raise RuntimeError("second derivatives under attention dropout need backend='reference'")
            inputs = [x for x in (qk, v) if x.requires_grad]
            again = ctx.twin(qk, v, buckets=_ranks(attended.order), padding_mask=real)
            by_input = iter(torch.autograd.grad(again, inputs, gradients[0], create_graph=True))
            return *(next(by_input) if x.requires_grad else None for x in (qk, v)), *[None] * 6
        with torch.autocast(qk.device.type, enabled=False):
            dqk, dv = ctx.engine.backward(
                qk, v, attended, dout=gradients[0], real=real, pattern=ctx.pattern, seed=ctx.seed
            )
        return dqk, dv, *[None] * 6


def _ranks(order: Int[Tensor, "*outer seq"]) -> Int[Tensor, "*outer seq"]:
    """Bucket ids by position that are sorted like those that made this order."""
    positions, starts = read_order(order)
    return torch.empty_like(positions).scatter_(-1, positions, starts.cumsum(-1))


def read_order(
    order: Int[Tensor, "*outer seq"],
) -> tuple[Int[Tensor, "*outer seq"], Bool[Tensor, "*outer seq"]]:
    """Positions in their order, and where a bucket starts."""
    starts = order < 0
    return torch.where(starts, ~order, order).long(), starts


def beside(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Room for as much, heads beside each other in memory as a projection wants them."""
    batch, heads, seq, dim = x.shape
    return x.new_empty(batch, seq, heads, dim, dtype=dtype).transpose(1, 2)
