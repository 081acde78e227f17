"""Local attention: chunks of the sequence in its own order, with queries and keys of their own."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reformer.attention import chunking
from reformer.attention.full import hide_padding
from reformer.attention.options import at_least, check_dropout, check_inputs


def local_attention(
    q: Float[Tensor, "batch heads seq dim"],
    k: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    chunk_length: int,
    n_chunks_before: int = 1,
    n_chunks_after: int | None = None,
    causal: bool = True,
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
    dropout_p: float = 0.0,
    wraps: bool = False,
) -> Float[Tensor, "batch heads seq value"]:
    """Attention within a chunk and its neighbours.

    Args:
        q: queries.
        k: keys, scaled by 1/√dim here.
        v: values.
        chunk_length: tokens a chunk.
        n_chunks_before: earlier chunks that a query sees besides its own.
        n_chunks_after: later ones; None is 0 if causal, else 1.
        causal: a query sees no later position.
        padding_mask: True at real tokens; outputs elsewhere are 0.
        dropout_p: share of attention weights dropped.
        wraps: whether the first and the last chunk are neighbours, as in transformers, where a chunk that is
            both before and after counts twice.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    at_least("chunk_length", chunk_length, 1)
    at_least("n_chunks_before", n_chunks_before, 0)
    if n_chunks_after is not None:
        at_least("n_chunks_after", n_chunks_after, 0)
    check_dropout(dropout_p)
    check_inputs(q, v, k=k, padding_mask=padding_mask)
    if v.numel() == 0:
        return v.clone()
    seq = q.shape[2]
    chunks = chunking.n_chunks(seq, chunk_length=chunk_length)
    after = n_chunks_after if n_chunks_after is not None else (0 if causal else 1)
    if wraps and chunks > 1:
        offsets = tuple(range(-n_chunks_before, after + 1))
    else:
        offsets = tuple(range(-min(n_chunks_before, chunks - 1), min(after, chunks - 1) + 1))

    def split(x: Tensor) -> Tensor:
        return chunking.split_chunks(
            chunking.pad_to_chunks(x, chunk_length=chunk_length), chunk_length=chunk_length
        )

    position = torch.arange(chunks * chunk_length, device=q.device).view(1, chunks, chunk_length, 1)
    key_position = chunking.look_around(position, offsets=offsets).transpose(-1, -2)
    distance = (position - key_position) if causal else torch.zeros_like(position - key_position)
    index = chunking.window_chunks(chunks, offsets=offsets, device=q.device)
    inside = ((index >= 0) & (index < chunks) | wraps).repeat_interleave(chunk_length, dim=1)[:, None, :]
    visible = (distance >= 0) & inside & (key_position < seq)
    if padding_mask is not None:
        real = split(padding_mask.unsqueeze(-1))
        visible = visible.unsqueeze(0) & chunking.look_around(real, offsets=offsets).transpose(
            -1, -2
        ).unsqueeze(1)
    # Every token keeps itself, so that no row is empty; padding is hidden afterwards.
    visible = visible | (position == key_position)
    out = F.scaled_dot_product_attention(
        split(q),
        chunking.look_around(split(k), offsets=offsets),
        chunking.look_around(split(v), offsets=offsets),
        attn_mask=visible,
        dropout_p=dropout_p,
    )
    return hide_padding(chunking.merge_chunks(out)[:, :, :seq], padding_mask=padding_mask)
