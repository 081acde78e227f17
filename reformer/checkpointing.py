"""A stack of blocks whose backward pass recomputes each block from its two input streams.

Besides them, each attention's buckets are kept, so that the recompute never hashes again.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reformer.attention.modules import AttentionCall
from reformer.layer import Block
from reformer.replay import Replay


def run_checkpointed(
    blocks: Sequence[Block],
    x1: Float[Tensor, "batch seq d_model"],
    x2: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
    """Run the blocks; same outputs and gradients as the plain stack, two streams a block kept.

    Source: Chen, Xu, Zhang, Guestrin 2016, "Training deep nets with sublinear memory cost".
    """
    for block in blocks:
        parameters = block.trainable_parameters()
        x1, x2 = _CheckpointedBlock.apply(  # type: ignore[no-untyped-call]
            block, replace(call, source=None), x1, x2, call.source, *parameters
        )
    return x1, x2


class _CheckpointedBlock(torch.autograd.Function):
    """Parameters and source are inputs, as in the reversible stack: a change before backward is noticed."""

    @staticmethod
    def forward(
        ctx: Any,
        block: Block,
        call: AttentionCall,
        x1: Tensor,
        x2: Tensor,
        source: Tensor | None,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        ctx.block, ctx.call, ctx.replay = block, call, Replay.capture(x1.device, block=block)
        nothing = [None] * len(block.branches())
        y1, y2, buckets = _run(block, x1, x2, call=replace(call, source=source), buckets=nothing)
        ctx.save_for_backward(x1, x2, source, *buckets, *parameters)
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x1, x2, source, *saved = ctx.saved_tensors
        buckets = saved[: len(ctx.block.branches())]
        with ctx.replay.recomputing():
            x1, x2 = x1.detach().requires_grad_(), x2.detach().requires_grad_()
            source = None if source is None else source.detach().requires_grad_()
            y1, y2, _ = _run(ctx.block, x1, x2, call=replace(ctx.call, source=source), buckets=buckets)
        leaves = [x1, x2] if source is None else [x1, x2, source]
        inputs = [*leaves, *ctx.block.trainable_parameters()]
        dx1, dx2, *found = torch.autograd.grad((y1, y2), inputs, gradients, allow_unused=True)
        return (None, None, dx1, dx2, *([None] if source is None else []), *found)


def _run(
    block: Block,
    x1: Float[Tensor, "batch seq d_model"],
    x2: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
    buckets: Sequence[Int[Tensor, "batch heads n_hashes seq"] | None],
) -> tuple[
    Float[Tensor, "batch seq d_model"],
    Float[Tensor, "batch seq d_model"],
    list[Int[Tensor, "batch heads n_hashes seq"] | None],
]:
    """The block's output streams, and the buckets of each branch: the given ones, if there are any."""
    used = []
    for branch, given in zip(block.branches(), buckets, strict=True):
        attended = branch(x2, call=call, buckets=given)
        x1, x2 = x2, x1 + attended.out
        used.append(attended.buckets)
    return x1, x2, used
