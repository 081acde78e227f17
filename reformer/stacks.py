"""Stacks of blocks, one a residual kind, on the same parameters."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from reformer.attention.modules import AttentionCall
from reformer.layer import Block
from reformer.reversible import run_reversible


def run_stack(
    blocks: Sequence[Block],
    x: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
    residual: str,
) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
    """Both streams start as `x` and end as the pair returned; the residual kinds differ in memory alone."""
    if residual == "reversible" and torch.is_grad_enabled():
        return run_reversible(blocks, x, x, call=call)
    return run_plain(blocks, x, x, call=call)


def run_plain(
    blocks: Sequence[Block],
    x1: Float[Tensor, "batch seq d_model"],
    x2: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
    """Run the blocks, keeping what autograd keeps."""
    for block in blocks:
        x1 = x1 + block.attend(x2, call=call).out
        x2 = x2 + block.feed(x1)
    return x1, x2
