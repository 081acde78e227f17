"""Combining hash rounds into one attention."""

from jaxtyping import Float
from torch import Tensor


def combine_rounds(
    out: Float[Tensor, "batch heads rounds seq dim"], logsumexp: Float[Tensor, "batch heads rounds seq"]
) -> Float[Tensor, "batch heads seq dim"]:
    """Weigh each round by the softmax mass it saw: Σ_r exp(z_r − logsumexp_r z_r)·o_r.

    That equals one softmax over the union of what the rounds saw; a plain mean of rounds does not.

    Source: Kitaev, Kaiser, Levskaya 2020, appendix A, equation 7.
    """
    weights = logsumexp.softmax(dim=2).to(out.dtype)
    return (out * weights.unsqueeze(-1)).sum(dim=2)
