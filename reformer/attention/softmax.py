"""A softmax that also hands out its log-sum-exp, in as few passes over the scores as autograd allows."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def softmax_and_logsumexp(
    scores: Float[Tensor, "*rows key"],
) -> tuple[Float[Tensor, "*rows key"], Float[Tensor, "*rows"]]:
    """Softmax over the last dimension, and the log-sum-exp of each row."""
    weights, logsumexp = _Softmax.apply(scores)  # type: ignore[no-untyped-call]
    return weights, logsumexp


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores.softmax(dim=-1)
        # The largest weight is exp(largest score − logsumexp). An exp of its own over masked scores would
        # be ten times slower: vectorised exponentials fall back to scalar ones where they underflow.
        logsumexp = scores.amax(dim=-1) - weights.amax(dim=-1).log()
        ctx.save_for_backward(weights)
        return weights, logsumexp

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        dweights, dlogsumexp = gradients
        # A weight's gradient by its own score and by every other's, and that of the log-sum-exp.
        shift = torch.einsum("...k,...k->...", dweights, weights) - dlogsumexp
        dscores: Tensor = (dweights - shift.unsqueeze(-1)) * weights
        return dscores
