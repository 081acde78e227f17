"""A stack of blocks whose backward pass recomputes every activation from the outputs.

Kept for backward: the two output streams, and of each attention the buckets it used, so that the recompute
never hashes again.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from reformer.attention.modules import AttentionCall
from reformer.layer import Block
from reformer.randomness import RandomState


def run_reversible(
    blocks: Sequence[Block],
    x1: Float[Tensor, "batch seq d_model"],
    x2: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
    """Run the blocks; same outputs and gradients as the plain stack, memory that does not grow with depth.

    Source: Kitaev, Kaiser, Levskaya 2020, §3; Gomez et al. 2017.
    """
    parameters = [
        parameter
        for block in blocks
        for parameter in (*block.attention_parameters(), *block.feed_forward_parameters())
    ]
    y1, y2 = _ReversibleStack.apply(tuple(blocks), call, x1, x2, *parameters)  # type: ignore[no-untyped-call]
    return y1, y2


@dataclass(frozen=True)
class _Replay:
    """What a branch needs to give the same values again."""

    random: RandomState | None
    training: tuple[tuple[nn.Module, bool], ...]
    autocast: bool
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def capture(device: torch.device, *, block: Block) -> "_Replay":
        training = tuple((module, module.training) for module in block.modules()) if block.has_dropout else ()
        return _Replay(
            RandomState.capture(device) if any(mode for _, mode in training) else None,
            training,
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
            device,
        )

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Gradients on, the same modules in training, the same random numbers, the same autocast."""
        random = self.random.replayed() if self.random is not None else nullcontext()
        autocast = torch.autocast(self.device.type, dtype=self.dtype, enabled=self.autocast)
        with torch.enable_grad(), _in_modes(self.training), random, autocast:
            yield


@contextmanager
def _in_modes(training: tuple[tuple[nn.Module, bool], ...]) -> Iterator[None]:
    """Modules in training or not as given, whatever `train()` and `eval()` made of them since."""
    now = [(module, module.training) for module, _ in training]
    try:
        for module, mode in training:
            module.training = mode
        yield
    finally:
        for module, mode in now:
            module.training = mode


class _ReversibleStack(torch.autograd.Function):
    """The parameters are inputs and their gradients are returned, so that hooks, `torch.autograd.grad` and
    inputs that need no gradient work as with any other function."""

    @staticmethod
    def forward(
        ctx: Any,
        blocks: tuple[Block, ...],
        call: AttentionCall,
        x1: Tensor,
        x2: Tensor,
        *parameters: nn.Parameter,
    ) -> tuple[Tensor, Tensor]:
        kept: list[Tensor | None] = []
        replays: list[tuple[_Replay, _Replay]] = []
        for block in blocks:
            attention = _Replay.capture(x1.device, block=block)
            attended = block.attend(x2, call=call)
            x1 = x1 + attended.out
            feed_forward = _Replay.capture(x1.device, block=block)
            x2 = x2 + block.feed(x1)
            kept.append(attended.buckets)
            replays.append((attention, feed_forward))
        ctx.blocks, ctx.call, ctx.replays = blocks, call, replays
        ctx.save_for_backward(x1, x2, *kept, *parameters)
        return x1, x2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y1, y2, *kept = ctx.saved_tensors
        dy1, dy2 = gradients
        per_block: list[list[Tensor | None]] = []
        for block, (attention, feed_forward), buckets in reversed(
            list(zip(ctx.blocks, ctx.replays, kept, strict=False))
        ):
            with feed_forward.recomputing():
                inner = y1.detach().requires_grad_()
                fed = block.feed(inner)
            dinner, *feed_gradients = _gradients(fed, (inner, *block.feed_forward_parameters()), dy2)
            y2 = y2 - fed.detach()
            dy1 = _add(dy1, dinner)
            with attention.recomputing():
                inner = y2.detach().requires_grad_()
                attended = block.attend(inner, call=ctx.call, buckets=buckets).out
            dinner, *attention_gradients = _gradients(attended, (inner, *block.attention_parameters()), dy1)
            y1 = y1 - attended.detach()
            dy2 = _add(dy2, dinner)
            per_block.append([*attention_gradients, *feed_gradients])
        flat = [gradient for block_gradients in reversed(per_block) for gradient in block_gradients]
        return (None, None, dy1, dy2, *flat)


def _gradients(out: Tensor, inputs: tuple[Tensor, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
    if not out.requires_grad:
        return (None,) * len(inputs)
    return torch.autograd.grad(out, inputs, gradient.to(out.dtype), allow_unused=True)


def _add(gradient: Tensor, more: Tensor | None) -> Tensor:
    return gradient if more is None else gradient + more
