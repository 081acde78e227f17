"""Row-wise functions computed in blocks, recomputed in backward, so that their inside is never kept."""

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reformer.autocasting import Autocast


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
    return torch.cat([_recomputed(function, block, random=random) for block in x.split(length, dim=1)], dim=1)


def sum_blocks(
    function: Callable[..., Float[Tensor, ""]],
    *inputs: Shaped[Tensor, "batch seq ..."],
    length: int | None,
    random: bool = False,
) -> Float[Tensor, ""]:
    """Add up a sum over rows of all inputs, `length` rows at a time; otherwise as `map_blocks`."""
    if length is None or length >= inputs[0].shape[1]:
        return function(*inputs)
    blocks = zip(*(x.split(length, dim=1) for x in inputs), strict=True)
    return torch.stack([_recomputed(function, *block, random=random) for block in blocks]).sum()


def _recomputed(function: Callable[..., Tensor], *blocks: Tensor, random: bool) -> Tensor:
    # A block casts weights by itself: else the gradients of all of them would be added up in a narrow type.
    with Autocast.here(blocks[0].device).entered(cache=False):
        if not torch.is_grad_enabled():
            return function(*blocks)
        return cast(Tensor, checkpoint(function, *blocks, use_reentrant=False, preserve_rng_state=random))
