"""Cross-attention: every token of one sequence looks at all of another, the source."""

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reformer.attention.options import check_dropout, check_padding_mask


def cross_attention(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch heads source dim"],
    v: Float[Tensor, "batch heads source value"],
    *,
    padding_mask: Bool[Tensor, "batch source"] | None = None,
    dropout_p: float = 0.0,
) -> Float[Tensor, "batch heads seq value"]:
    """A softmax over the source, by torch's own kernel.

    Args:
        q: queries.
        k: keys of the source.
        v: values of the source.
        padding_mask: True at real tokens of the source; a source without any gives 0.
        dropout_p: share of attention weights dropped.

    Raises:
        ValueError: names the value, the rule and the mend.

    Source: Vaswani et al. 2017, §3.2.3 "encoder-decoder attention".
    """
    check_dropout(dropout_p)
    check_padding_mask(padding_mask, expected=(k.shape[0], k.shape[2]))
    if q.numel() == 0 or v.numel() == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    if padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
    blank = ~padding_mask.any(dim=1)
    # A softmax over nothing is no number: where no key is real all are seen, and the output is hidden.
    visible = (padding_mask | blank[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p)
    return out.masked_fill(blank[:, None, None, None], 0.0)
