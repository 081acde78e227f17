"""Dense slow twins, written to be checked against the paper: every pair of the sequence is looked at.

They cost O(rounds² · seq²) and share with the fast paths only the checking of arguments, the hash family
and the projection of keys.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.attention.options import LSHOptions, check_inputs, resolve_buckets
from reformer.attention.projection import unit_keys
from reformer.hashing import CrossPolytope
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily


def lsh_attention(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    n_hashes: int,
    chunk_length: int,
    n_buckets: Buckets | None = None,
    max_length: int | None = None,
    causal: bool = True,
    causality: str = "strict",
    duplicates: str = "count",
    seams: str = "masked",
    logit_scale: str = "trax",
    n_chunks_before: int = 1,
    n_chunks_after: int | None = None,
    bucket_mask: bool | None = None,
    hashing: HashFamily = CrossPolytope(),
    generator: torch.Generator | None = None,
    buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Float[Tensor, "batch heads seq value"]:
    """The dense twin of `reformer.lsh_attention`, with its signature and meaning.

    A pair's weight is N·exp(q·k), N the number of windows that show it (`sum`), or 1 if any does (`count`).
    """
    options = LSHOptions(
        n_hashes=n_hashes,
        chunk_length=chunk_length,
        n_chunks_before=n_chunks_before,
        n_chunks_after=n_chunks_after,
        causal=causal,
        causality=causality,
        duplicates=duplicates,
        seams=seams,
        logit_scale=logit_scale,
        bucket_mask=bucket_mask,
        dropout_p=dropout_p,
        backend=backend,
    )
    check_inputs(qk, v, padding_mask=padding_mask)
    if v.numel() == 0:
        return v.clone()
    ids = resolve_buckets(
        qk,
        options=options,
        n_buckets=n_buckets,
        max_length=max_length,
        hashing=hashing,
        generator=generator,
        buckets=buckets,
        padding_mask=padding_mask,
    )
    batch, _, seq, _ = qk.shape
    real = torch.ones(batch, seq, dtype=torch.bool) if padding_mask is None else padding_mask
    count = times_shown(ids, padding_mask=real, options=options)
    if options.duplicates == "count":
        count = count.clamp(max=1)
    scores = qk @ unit_keys(qk, logit_scale=logit_scale).transpose(-1, -2)
    own = torch.eye(seq, dtype=torch.bool, device=qk.device)
    scores = scores.masked_fill(own, -1e5) + count.to(scores.dtype).log()
    weights = scores.masked_fill(~real[:, None, :, None], 0.0).softmax(dim=-1)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
    return (weights @ v).masked_fill(~real[:, None, :, None], 0.0)


def times_shown(
    buckets: Int[Tensor, "batch heads rounds seq"],
    *,
    padding_mask: Bool[Tensor, "batch seq"],
    options: LSHOptions,
) -> Int[Tensor, "batch heads query key"]:
    """How many windows show each pair, by counting.

    Every token has a slot in the sorted order of every round, padding behind all real tokens. A query in
    round r meets a key in the ordering of round s if that slot lies in the query's window.
    """
    _, _, rounds, seq = buckets.shape
    length = options.chunk_length
    chunks = -(-seq // length)
    real = padding_mask[:, None, None, :]
    ids = buckets.masked_fill(~real, int(buckets.max()) + 1)
    position = torch.arange(seq, device=buckets.device)
    before = (ids[..., None, :] < ids[..., :, None]) | (
        (ids[..., None, :] == ids[..., :, None]) & (position[None, :] < position[:, None])
    )
    slot = before.sum(dim=-1)
    allowed = padding_mask[:, None, None, :] & padding_mask[:, None, :, None]
    if options.causal:
        allowed = allowed & (position[None, :] <= position[:, None])

    count = torch.zeros_like(ids[:, :, 0, :, None] * ids[:, :, 0, None, :])
    for query_round in range(rounds):
        for key_round in range(rounds):
            query_slot, key_slot = slot[:, :, query_round, :, None], slot[:, :, key_round, None, :]
            shown = _in_window(
                query_slot // length + query_round * chunks,
                key_slot // length + key_round * chunks,
                n_chunks=chunks * rounds,
                wraps=options.seams == "reference",
                options=options,
            )
            if options.seams == "masked" or options.same_bucket:
                shown = shown & (query_round == key_round)
            if options.same_bucket:
                shown = shown & (ids[:, :, query_round, :, None] == ids[:, :, key_round, None, :])
            if options.strict:
                distance = query_slot - key_slot
                shown = shown & (distance >= 0) & (distance <= options.n_chunks_before * length)
            count = count + (shown & allowed)
    return count


def _in_window(
    query_chunk: Int[Tensor, "batch heads query 1"],
    key_chunk: Int[Tensor, "batch heads 1 key"],
    *,
    n_chunks: int,
    wraps: bool,
    options: LSHOptions,
) -> Bool[Tensor, "batch heads query key"]:
    distance = query_chunk - key_chunk
    shown = torch.zeros_like(distance, dtype=torch.bool)
    for offset in range(-options.after, options.n_chunks_before + 1):
        shown = shown | ((distance % n_chunks == offset % n_chunks) if wraps else distance == offset)
    return shown


def full_attention(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    causal: bool = True,
    logit_scale: str = "trax",
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq value"]:
    """The dense twin of `reformer.attention.full_attention`: every allowed pair, oneself last."""
    batch, _, seq, _ = qk.shape
    real = torch.ones(batch, seq, dtype=torch.bool) if padding_mask is None else padding_mask
    scores = qk @ unit_keys(qk, logit_scale=logit_scale).transpose(-1, -2)
    scores = scores.masked_fill(torch.eye(seq, dtype=torch.bool), -1e5)
    if causal:
        scores = scores.masked_fill(torch.ones(seq, seq, dtype=torch.bool).triu(1), -torch.inf)
    scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
    scores = scores.masked_fill(~real[:, None, :, None], 0.0)
    return (scores.softmax(dim=-1) @ v).masked_fill(~real[:, None, :, None], 0.0)


def oracle_attention(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    n_keys: int,
    causal: bool = True,
    logit_scale: str = "trax",
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
) -> Float[Tensor, "batch heads seq value"]:
    """The dense twin of `reformer.attention.oracle_attention`: a key is seen if under `n_keys` are nearer."""
    batch, _, seq, _ = qk.shape
    real = torch.ones(batch, seq, dtype=torch.bool) if padding_mask is None else padding_mask
    own = torch.eye(seq, dtype=torch.bool)
    allowed = real[:, None, None, :].expand(batch, 1, seq, seq)
    if causal:
        allowed = allowed & torch.ones(seq, seq, dtype=torch.bool).tril()
    scores = qk @ unit_keys(qk, logit_scale=logit_scale).transpose(-1, -2)
    others = scores.masked_fill(~allowed | own, -torch.inf)
    nearer = (others[..., None, :] > others[..., :, None]).sum(dim=-1)
    visible = allowed & (own | (nearer < n_keys))
    scores = scores.masked_fill(own, -1e5).masked_fill(~visible, -torch.inf)
    scores = scores.masked_fill(~real[:, None, :, None], 0.0)
    return (scores.softmax(dim=-1) @ v).masked_fill(~real[:, None, :, None], 0.0)


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
    wraps: bool = False,
) -> Float[Tensor, "batch heads seq value"]:
    """The dense twin of `reformer.attention.local_attention`: a pair counts once an offset that shows it."""
    batch, _, seq, dim = q.shape
    after = n_chunks_after if n_chunks_after is not None else (0 if causal else 1)
    real = torch.ones(batch, seq, dtype=torch.bool) if padding_mask is None else padding_mask
    position = torch.arange(seq)
    chunks = -(-seq // chunk_length)
    distance = position[None, :] // chunk_length - position[:, None] // chunk_length
    count = torch.zeros_like(distance)
    for offset in range(-n_chunks_before, after + 1):
        count = count + (((distance - offset) % chunks == 0) if wraps else (distance == offset))
    if causal:
        count = count * (position[None, :] <= position[:, None])
    visible = count * real[:, None, None, :]
    scores = q @ k.transpose(-1, -2) / math.sqrt(dim) + visible.to(q.dtype).log()
    scores = scores.masked_fill(~real[:, None, :, None], 0.0)
    return (scores.softmax(dim=-1) @ v).masked_fill(~real[:, None, :, None], 0.0)
