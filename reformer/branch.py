"""What a block adds to a stream, and how backward finds its gradients when nothing of it was kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.attention.head_groups import HeadGroups
from reformer.attention.modules import Attended, AttentionCall
from reformer.autocasting import Autocast


class Gradients(NamedTuple):
    """The output of a branch that was computed again, and the gradients of what it depends on.

    None where it does not depend on it; those of parameters are in the order of `trainable_parameters`.
    """

    out: Float[Tensor, "batch seq d_model"]
    stream: Float[Tensor, "batch seq d_model"] | None
    source: Float[Tensor, "batch source width"] | None
    parameters: list[Tensor | None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """What a block adds to one stream, computed from the other one.

    Args:
        block: whose branch it is.
        parts: its modules, but for dropout.
        function: from a stream, what the pass tells attention, and buckets that replace hashing.
        row_block: if rows are computed by themselves, so many at a time; None is all.
        head_groups: the same branch some heads at a time, if it is to be.
    """

    block: nn.Module
    parts: tuple[nn.Module, ...]
    function: Callable[[Tensor, AttentionCall, Tensor | None], Attended]
    row_block: int | None = None
    head_groups: HeadGroups | None = None

    def __call__(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    ) -> Attended:
        """The branch, and the buckets it used if it hashed."""
        return self.function(x, call, buckets)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those that need a gradient."""
        return [
            parameter for part in self.parts for parameter in part.parameters() if parameter.requires_grad
        ]

    def vjp(
        self,
        x: Float[Tensor, "batch seq d_model"],
        gradient: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
        autocast: Autocast,
    ) -> Gradients:
        """Compute the branch again, and the product of that gradient of its output with its Jacobian.

        Where it is computed in parts, the gradients of a part are taken before the next one begins, so that
        what is kept for them is never more than of one part. Gradients are taken under the given autocast.
        """
        if self.head_groups is not None and self.head_groups.serve(call):
            out, stream, parameters = self.head_groups.vjp(
                x, gradient, call=call, buckets=buckets, autocast=autocast
            )
            return Gradients(out, stream, None, [parameters[each] for each in self.trainable_parameters()])
        if self.row_block is not None and self.row_block < x.shape[1]:
            return self._vjp_by_rows(x, gradient, call=call, length=self.row_block, autocast=autocast)
        return self._vjp_at_once(x, gradient, call=call, buckets=buckets, autocast=autocast)

    def _vjp_by_rows(
        self,
        x: Float[Tensor, "batch seq d_model"],
        gradient: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        length: int,
        autocast: Autocast,
    ) -> Gradients:
        out, stream = torch.empty_like(x), torch.empty_like(x)
        total: list[Tensor | None] = []
        for start in range(0, x.shape[1], length):
            rows = slice(start, start + length)
            found = self._vjp_at_once(
                x[:, rows], gradient[:, rows], call=call, buckets=None, autocast=autocast
            )
            out[:, rows] = found.out
            stream[:, rows] = found.stream if found.stream is not None else 0.0
            for so_far, more in zip(total, found.parameters, strict=False):
                if so_far is not None and more is not None:
                    so_far.add_(more)
            total = total or found.parameters
        return Gradients(out, stream, None, total)

    def _vjp_at_once(
        self,
        x: Float[Tensor, "batch seq d_model"],
        gradient: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
        autocast: Autocast,
    ) -> Gradients:
        stream = x.detach().requires_grad_()
        source = None if call.source is None else call.source.detach().requires_grad_()
        with torch.enable_grad():
            out = self(stream, call=replace(call, source=source), buckets=buckets).out
        leaves = [stream] if source is None else [stream, source]
        inputs = [*leaves, *self.trainable_parameters()]
        found: list[Tensor | None] = [None] * len(inputs)
        if out.requires_grad:
            with autocast.entered():
                found = list(torch.autograd.grad(out, inputs, gradient.to(out.dtype), allow_unused=True))
        return Gradients(
            out.detach(), found[0], found[1] if source is not None else None, found[len(leaves) :]
        )
