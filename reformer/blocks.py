"""Row-wise functions computed in blocks, recomputed in backward, so that their inside is never kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import Any, cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from reformer.autocasting import Autocast
from reformer.compilation import uncompiled
from reformer.randomness import RandomState


def map_blocks(
    function: Callable[[Float[Tensor, "batch rows inner"]], Float[Tensor, "batch rows outer"]],
    x: Float[Tensor, "batch seq inner"],
    *,
    length: int | None,
    random: bool = False,
) -> Float[Tensor, "batch seq outer"]:
    """Apply a row-wise function to `length` rows at a time; None applies it at once.

    Args:
        function: what is applied to the rows.
        x: the rows.
        length: rows of a block.
        random: whether the function draws from the global random stream; backward then draws the same again.
    """
    if length is None or length >= x.shape[1]:
        return function(x)
    blocks = x.split(length, dim=1)
    if torch.is_grad_enabled():
        return torch.cat([_recomputed(function, block, random=random) for block in blocks], dim=1)
    first = function(blocks[0])
    # Filled block by block: many results that wait to be joined would leave holes where they were.
    out = first.new_empty(*x.shape[:2], first.shape[2])
    for rows, done in zip(out.split(length, dim=1), chain([first], map(function, blocks[1:])), strict=True):
        rows.copy_(done)
    return out


def sum_blocks(
    function: Callable[..., Float[Tensor, ""]],
    *inputs: Shaped[Tensor, "batch seq ..."],
    parameters: Sequence[Tensor],
    length: int | None,
    random: bool = False,
) -> Float[Tensor, ""]:
    """Add up a sum over rows, `length` rows at a time; it can be differentiated once.

    Args:
        function: of some rows of all inputs, their sum.
        inputs: the rows.
        parameters: what else the function depends on, as far as it needs a gradient.
        length: rows of a block; None takes all at once.
        random: whether the function draws from the global random stream; backward then draws the same again.
    """
    if length is None or length >= inputs[0].shape[1]:
        return function(*inputs)
    apply = uncompiled(_SumOfBlocks.apply)
    total: Tensor = apply(function, length, random, len(inputs), *inputs, *parameters)
    return total


def _recomputed(function: Callable[..., Tensor], block: Tensor, *, random: bool) -> Tensor:
    # A block casts weights by itself: else the gradients of all of them would be added up in a narrow type.
    with Autocast.here(block.device).entered(cache=False):
        return cast(Tensor, checkpoint(function, block, use_reentrant=False, preserve_rng_state=random))


class _SumOfBlocks(torch.autograd.Function):
    """The gradients of inputs are written where they belong, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        length: int,
        random: bool,
        n_inputs: int,
        *tensors: Tensor,
    ) -> Tensor:
        device = tensors[0].device
        ctx.function, ctx.length, ctx.n_inputs = function, length, n_inputs
        ctx.random = RandomState.capture(device) if random else None
        ctx.autocast = Autocast.here(device)
        ctx.save_for_backward(*tensors)
        return torch.stack([function(*block) for block in _split(tensors[:n_inputs], length)]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        n, needed = ctx.n_inputs, ctx.needs_input_grad[4:]
        inputs, parameters = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        found = [
            torch.zeros_like(x) if need else None for x, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        trained = [x for x, need in zip(parameters, needed[n:], strict=True) if need]
        with ctx.random.replayed() if ctx.random is not None else nullcontext():
            for start in range(0, inputs[0].shape[1], ctx.length):
                rows = slice(start, start + ctx.length)
                leaves = [
                    x[:, rows].detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=False)
                ]
                with torch.enable_grad(), ctx.autocast.entered(cache=False):
                    out = ctx.function(*leaves)
                wanted = [x for x in leaves if x.requires_grad] + trained
                more = torch.autograd.grad(out, wanted, gradients[0], materialize_grads=True)
                totals = [*(x if x is None else x[:, rows] for x in found[:n]), *found[n:]]
                for total, each in zip((x for x in totals if x is not None), more, strict=True):
                    total += each
        return (None, None, None, None, *found)


def _split(tensors: Sequence[Tensor], length: int) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of rows of all of them."""
    return zip(*(x.split(length, dim=1) for x in tensors), strict=True)
