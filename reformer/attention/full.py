"""Full attention: with the Reformer's shared query-key semantics, or the standard kind."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reformer.attention.masking import SELF
from reformer.attention.options import LOGIT_SCALES, check_dropout, check_inputs, one_of
from reformer.attention.projection import unit_keys


def full_attention(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    causal: bool = True,
    logit_scale: str = "trax",
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "batch heads seq value"]:
    """What LSH attention approximates: every pair, the same shared query-key, key norm and self-mask.

    Args:
        qk: shared queries and keys, unnormalised.
        v: values.
        causal: a query sees no later position.
        logit_scale: `trax` or `sqrt_d`, see `unit_keys`.
        padding_mask: True at real tokens; outputs elsewhere are 0.
        dropout_p: share of attention weights dropped.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    one_of("logit_scale", logit_scale, LOGIT_SCALES)
    check_dropout(dropout_p)
    check_inputs(qk, v, padding_mask=padding_mask)
    if v.numel() == 0:
        return v.clone()
    bias = pair_bias(qk, causal=causal, padding_mask=padding_mask)
    keys = unit_keys(qk, logit_scale=logit_scale)
    out = F.scaled_dot_product_attention(qk, keys, v, attn_mask=bias, dropout_p=dropout_p, scale=1.0)
    return hide_padding(out, padding_mask=padding_mask)


def full_standard_attention(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    causal: bool = True,
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "batch heads seq value"]:
    """Standard attention, what a user would pick instead: torch's own kernel.

    Args:
        q: queries.
        k: keys.
        v: values.
        causal: a query sees no later position.
        padding_mask: True at real tokens; outputs elsewhere are 0.
        dropout_p: share of attention weights dropped.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    check_dropout(dropout_p)
    check_inputs(q, v, k=k, padding_mask=padding_mask)
    if v.numel() == 0:
        return v.clone()
    if padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=causal)
    visible = _visible(q.shape[2], causal=causal, padding_mask=padding_mask)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p)
    return hide_padding(out, padding_mask=padding_mask)


def hide_padding(
    out: Float[Tensor, "batch heads seq value"], *, padding_mask: Bool[Tensor, "batch seq"] | None
) -> Float[Tensor, "batch heads seq value"]:
    """Outputs at padding are 0."""
    if padding_mask is None:
        return out
    return out.masked_fill(~padding_mask[:, None, :, None], 0.0)


def pair_bias(
    qk: Float[Tensor, "batch heads seq dim"], *, causal: bool, padding_mask: Bool[Tensor, "batch seq"] | None
) -> Float[Tensor, "..."]:
    """What is added to the logits: a finite penalty for oneself, −∞ for what is hidden."""
    seq = qk.shape[2]
    own = torch.eye(seq, dtype=torch.bool, device=qk.device)
    penalty = max(SELF, torch.finfo(qk.dtype).min)
    bias = qk.new_zeros(seq, seq).masked_fill(own, penalty)
    if causal:
        bias = bias.masked_fill(own.new_ones(seq, seq).triu(1), -torch.inf)
    if padding_mask is None:
        return bias
    hidden = ~padding_mask[:, None, None, :] & ~own
    return bias.masked_fill(hidden, -torch.inf)


def _visible(
    seq: int, *, causal: bool, padding_mask: Bool[Tensor, "batch seq"]
) -> Bool[Tensor, "batch 1 seq seq"]:
    """Allowed pairs; every token keeps itself, so that no row is empty."""
    own = torch.eye(seq, dtype=torch.bool, device=padding_mask.device)
    visible = padding_mask[:, None, None, :] | own
    return visible & own.new_ones(seq, seq).tril() if causal else visible
