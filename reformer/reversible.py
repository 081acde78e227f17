"""A stack of blocks whose backward pass recomputes every activation from the outputs.

Kept for backward: the two output streams, and of each attention the buckets it used, so that the recompute
never hashes again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.attention.modules import AttentionCall
from reformer.autocasting import Autocast
from reformer.branch import Branch, Gradients
from reformer.layer import Block
from reformer.lifting import FloatLifting, Lifting
from reformer.randomness import RandomState
from reformer.replay import Replay


def run_reversible(
    blocks: Sequence[Block],
    x1: Float[Tensor, "batch seq d_model"],
    x2: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
    lifting: Lifting,
) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
    """Run the blocks; same outputs and gradients as the plain stack, memory that does not grow with depth.

    Source: Kitaev, Kaiser, Levskaya 2020, §3; Gomez et al. 2017.
    """
    branches = tuple(branch for block in blocks for branch in block.branches())
    parameters = [parameter for branch in branches for parameter in branch.trainable_parameters()]
    y1, y2 = _ReversibleStack.apply(  # type: ignore[no-untyped-call]
        branches, replace(call, source=None), lifting, x1, x2, call.source, *parameters
    )
    return y1, y2


@torch.no_grad()
def reconstruction_errors(
    blocks: Sequence[Block],
    x: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
    lifting: Lifting = FloatLifting(),
) -> Float[Tensor, " layers"]:
    """Largest difference between the input streams of each block and what backward recomputes them as.

    Blocks are undone from the outputs of the last one, so errors add up towards the first. Both streams start
    as `x`; the global random stream is left where it was.

    Raises:
        OverflowError: streams too large for integer lifting.
    """
    x1 = x2 = lifting.start(x)
    passed = []
    with RandomState.capture(x.device).replayed():
        for block in blocks:
            before, steps = (x1, x2), []
            for branch in block.branches():
                x1, x2, step, buckets = _run(branch, x1, x2, call=call, lifting=lifting)
                steps.append((step, buckets))
            passed.append((before, steps))
    lifting.check()
    errors = []
    for (before1, before2), steps in reversed(passed):
        for step, buckets in reversed(steps):
            x1, x2 = lifting.subtract(x2, step.again(x1, source=call.source, buckets=buckets)), x1
        errors.append(torch.maximum((x1 - before1).abs().amax(), (x2 - before2).abs().amax()))
    return torch.stack(errors[::-1])


@dataclass(frozen=True)
class _Step:
    """What a branch needs to be run again."""

    branch: Branch
    call: AttentionCall
    replay: Replay

    def again(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        source: Float[Tensor, "batch source width"] | None,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The branch of that stream."""
        with self.replay.recomputing(), torch.no_grad():
            return self.branch(x, call=replace(self.call, source=source), buckets=buckets).out

    def vjp(
        self,
        x: Float[Tensor, "batch seq d_model"],
        gradient: Float[Tensor, "batch seq d_model"],
        *,
        source: Float[Tensor, "batch source width"] | None,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
    ) -> Gradients:
        """The branch of that stream, and what a gradient of its output makes of what it depends on."""
        call, autocast = replace(self.call, source=source), Autocast.here(x.device)
        with self.replay.recomputing():
            return self.branch.vjp(x, gradient, call=call, buckets=buckets, autocast=autocast)


def _run(
    branch: Branch,
    x1: Float[Tensor, "batch seq d_model"],
    x2: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
    lifting: Lifting,
) -> tuple[
    Float[Tensor, "batch seq d_model"],
    Float[Tensor, "batch seq d_model"],
    _Step,
    Int[Tensor, "batch heads n_hashes seq"] | None,
]:
    """The streams behind a branch, how to run it again, and the buckets it used."""
    step = _Step(branch, replace(call, source=None), Replay.capture(x1.device, block=branch.block))
    attended = branch(x2, call=call)
    return x2, lifting.add(x1, attended.out), step, attended.buckets


class _ReversibleStack(torch.autograd.Function):
    """The parameters are inputs and their gradients are returned, so that hooks, `torch.autograd.grad` and
    inputs that need no gradient work as with any other function. So is the source, whose gradient is summed
    over the branches that look at it."""

    #: Gradients come in a list, which lets go of them where they are replaced.
    boxed_grads_call = True

    @staticmethod
    def forward(
        ctx: Any,
        branches: tuple[Branch, ...],
        call: AttentionCall,
        lifting: Lifting,
        x1: Tensor,
        x2: Tensor,
        source: Tensor | None,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        kept: list[Tensor | None] = []
        steps: list[_Step] = []
        for branch in branches:
            x1, x2, step, buckets = _run(branch, x1, x2, call=replace(call, source=source), lifting=lifting)
            kept.append(buckets)
            steps.append(step)
        ctx.lifting, ctx.steps = lifting, steps
        ctx.save_for_backward(x1, x2, source, *kept, *parameters)
        return x1, x2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("second derivatives need every activation; use residual='plain'")
        given = gradients[0] if isinstance(gradients[0], list) else list(gradients)
        y1, y2, source, *kept = ctx.saved_tensors
        # The graph lets go of the streams too, unless it is kept for a second time.
        ctx.maybe_clear_saved_tensors()
        dy2, dy1 = given.pop(), given.pop()
        dsource: Tensor | None = None
        per_branch: list[list[Tensor | None]] = []
        for step, buckets in reversed(list(zip(ctx.steps, kept, strict=False))):
            found = step.vjp(y1, dy2, source=source, buckets=buckets)
            y1, y2 = ctx.lifting.subtract(y2, found.out), y1
            dy1, dy2 = dy2, _add(dy1, found.stream)
            dsource = found.source if dsource is None else _add(dsource, found.source)
            per_branch.append(found.parameters)
            del found
        flat = [gradient for found in reversed(per_branch) for gradient in found]
        return (None, None, None, dy1, dy2, dsource, *flat)


def _add(gradient: Tensor, more: Tensor | None) -> Tensor:
    """Their sum, in the memory of the second."""
    if more is None:
        return gradient
    return torch.add(gradient, more, out=more) if more.dtype == gradient.dtype else gradient + more
