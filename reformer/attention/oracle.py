"""The ceiling of every hash: full attention cut to the keys that matter most to each query."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reformer.attention.full import hide_padding, pair_bias
from reformer.attention.options import LOGIT_SCALES, at_least, check_dropout, check_inputs, one_of
from reformer.attention.projection import unit_keys

#: Every pair of the sequence is held at once, and sorted out: longer ones are refused.
LONGEST = 4096


def oracle_attention(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    n_keys: int,
    causal: bool = True,
    logit_scale: str = "trax",
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "batch heads seq value"]:
    """Attention over the `n_keys` keys of largest logit: what a perfect hash would find.

    Otherwise as `full_attention`: shared query-key, keys at unit length, oneself only when nothing is left.

    Args:
        qk: shared queries and keys, unnormalised.
        v: values.
        n_keys: keys that a query sees besides itself; those that tie with the last one are seen too.
        causal: a query sees no later position.
        logit_scale: `trax` or `sqrt_d`, see `unit_keys`.
        padding_mask: True at real tokens; outputs elsewhere are 0.
        dropout_p: share of attention weights dropped.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    at_least("n_keys", n_keys, 0)
    one_of("logit_scale", logit_scale, LOGIT_SCALES)
    check_dropout(dropout_p)
    check_inputs(qk, v, padding_mask=padding_mask)
    if qk.shape[2] > LONGEST:
        raise ValueError(
            f"seq={qk.shape[2]}: the oracle holds every pair of at most {LONGEST} tokens; "
            "use shorter sequences or another kind of attention"
        )
    if v.numel() == 0:
        return v.clone()
    keys = unit_keys(qk, logit_scale=logit_scale)
    own = torch.eye(qk.shape[2], dtype=torch.bool, device=qk.device)
    bias = pair_bias(qk, causal=causal, padding_mask=padding_mask)
    # Oneself takes none of the places, and comes back with its penalty.
    others = nearest_alone(_logits(qk, keys), bias=bias.masked_fill(own, -torch.inf), n_keys=n_keys)
    bias = torch.where(own, bias, others)
    out = F.scaled_dot_product_attention(qk, keys, v, attn_mask=bias, dropout_p=dropout_p, scale=1.0)
    return hide_padding(out, padding_mask=padding_mask)


def nearest_alone(
    logits: Float[Tensor, "batch heads query key"],
    *,
    bias: Float[Tensor, "*#pairs #query key"],
    n_keys: int,
) -> Float[Tensor, "batch heads query key"]:
    """The bias that also hides all keys but the `n_keys` of largest logit among those it shows."""
    logits = logits.masked_fill(bias.isneginf(), -torch.inf)
    largest = logits.topk(min(n_keys, logits.shape[-1]), dim=-1).values
    last = largest[..., -1:] if largest.shape[-1] else torch.inf
    return bias.masked_fill(logits < last, -torch.inf)


@torch.no_grad()
def _logits(
    queries: Float[Tensor, "batch heads seq dim"], keys: Float[Tensor, "batch heads seq dim"]
) -> Float[Tensor, "batch heads seq seq"]:
    """Products wide enough that few of them tie."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        return queries.to(wide) @ keys.to(wide).transpose(-1, -2)
