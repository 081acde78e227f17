"""Stacks of blocks, one a residual kind, on the same parameters."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reformer.attention.modules import AttentionCall
from reformer.checkpointing import run_checkpointed
from reformer.compilation import uncompiled
from reformer.layer import Block
from reformer.lifting import FloatLifting, Lifting, build_lifting
from reformer.randomness import RandomState
from reformer.reversible import run_reversible


def run_stack(
    blocks: Sequence[Block],
    x: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
    residual: str,
    grid_bits: int,
) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
    """Both streams start as `x` and end as the pair returned.

    `plain`, `checkpoint` and `reversible` differ in memory alone. `reversible_exact` rounds to multiples of
    2^-grid_bits, and differs in memory alone from `run_plain` with the same lifting.

    Raises:
        OverflowError: a stream too large for `reversible_exact`.
    """
    lifting = build_lifting(residual, grid_bits=grid_bits)
    x = lifting.start(x)
    # Backward recomputes outside of what `torch.compile` makes, where kernels round otherwise and dropout
    # draws other numbers: only a forward pass that is not compiled either can be repeated.
    if residual == "plain" or not torch.is_grad_enabled():
        streams = run_plain(blocks, x, x, call=call, lifting=lifting)
    elif residual == "checkpoint":
        streams = uncompiled(run_checkpointed)(blocks, x, x, call=call)
    else:
        streams = uncompiled(run_reversible)(blocks, x, x, call=call, lifting=lifting)
    lifting.check()
    return streams


def run_plain(
    blocks: Sequence[Block],
    x1: Float[Tensor, "batch seq d_model"],
    x2: Float[Tensor, "batch seq d_model"],
    *,
    call: AttentionCall,
    lifting: Lifting = FloatLifting(),
) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]]:
    """Run the blocks, keeping what autograd keeps."""
    for block in blocks:
        for branch in block.branches():
            x1, x2 = x2, lifting.add(x1, branch(x2, call=call).out)
    return x1, x2


def gradient_cosine(
    blocks: Sequence[Block],
    x: Float[Tensor, "batch seq d_model"],
    *,
    objective: Callable[
        [Float[Tensor, "batch seq d_model"], Float[Tensor, "batch seq d_model"]], Float[Tensor, ""]
    ],
    call: AttentionCall,
    residual: str,
    grid_bits: int,
) -> Float[Tensor, ""]:
    """Cosine between a residual kind's gradient and the one from activations that were all kept.

    The gradient is that of `objective(y1, y2)` by `x` and all trainable parameters of the blocks; nothing is
    added to their `grad`, and the global random stream is left where it was.

    Raises:
        OverflowError: a stream too large for `reversible_exact`.
    """
    random = RandomState.capture(x.device)
    leaf = x.detach().requires_grad_()
    inputs = [leaf, *(parameter for block in blocks for parameter in block.trainable_parameters())]

    def gradient(run: Callable[[], tuple[Tensor, Tensor]]) -> Float[Tensor, " numbers"]:
        with torch.enable_grad(), random.replayed():
            found = torch.autograd.grad(objective(*run()), inputs, allow_unused=True, materialize_grads=True)
        return torch.cat([part.flatten().double() for part in found])

    def kept() -> tuple[Tensor, Tensor]:
        lifting = build_lifting(residual, grid_bits=grid_bits)
        start = lifting.start(leaf)
        return run_plain(blocks, start, start, call=call, lifting=lifting)

    def recomputed() -> tuple[Tensor, Tensor]:
        return run_stack(blocks, leaf, call=call, residual=residual, grid_bits=grid_bits)

    return F.cosine_similarity(gradient(recomputed), gradient(kept), dim=0)
