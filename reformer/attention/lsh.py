"""LSH attention: sort by hash bucket, attend within chunks, combine rounds."""

from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.attention import chunking, masking
from reformer.attention.options import LSHOptions, check_inputs, resolve_buckets
from reformer.attention.projection import EPSILON, key_scale, unit_keys
from reformer.attention.rounds import combine_rounds
from reformer.attention.softmax import softmax_and_logsumexp
from reformer.attention.sorting import SortOrder, sort_by_bucket, sort_rows, unsort_rows
from reformer.attention.windows import Windows, window_masks
from reformer.compilation import uncompiled
from reformer.hashing import CrossPolytope
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily
from reformer.kernels import union

#: Where the backends that compute one softmax over all rounds are; Triton need not be there.
_ENGINES = {"native": "native", "flash": "flash", "triton": "triton_attention.KERNEL", "flex": "flex.KERNEL"}


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
    """Attention in which a query sees only keys of its hash bucket: the Reformer's.

    Queries and keys are one projection; keys are used at unit length, and a token attends to itself only
    when nothing else is left. Any sequence length works; the same call gives the same result, and the
    global random stream is untouched unless `dropout_p` is set.

    Args:
        qk: shared queries and keys, unnormalised. Strides are accepted as they are.
        v: values; `value` may differ from `dim`.
        n_hashes: hash rounds; more find more of what full attention would see.
        chunk_length: tokens a chunk of the sorted sequence.
        n_buckets: buckets a round; a pair is a factorised count, None about two buckets a chunk.
        max_length: length that the automatic bucket count is made for; None: this input's.
        causal: a query sees no later position.
        causality: `strict` (default): the visible keys are the last n_chunks_before·chunk_length entries of
            the query's bucket, which depends on the past alone. `published`: chunk windows with a position
            mask, as the paper's code; which past keys fall into the window then depends on the future.
            `bucket`: `published` within the own bucket, which leaks less. Ignored unless `causal`.
        duplicates: `count` (default): a softmax over the *set* of visible pairs, so enough rounds converge
            to full attention. `sum`: a pair counts once a round that sees it, as Trax v2 and Hugging Face.
        seams: `masked` (default) keeps rounds apart; `reference` lets the first chunk of a round see the
            last one of the round before, as the published implementations do.
        logit_scale: `trax` or `sqrt_d`, see `unit_keys`.
        n_chunks_before: earlier chunks of the sorted sequence that a query sees besides its own.
        n_chunks_after: later ones; None is 0 if causal, else 1.
        bucket_mask: whether a query sees its own bucket only; None is what `causality` implies.
        hashing: the hash family.
        generator: CPU generator of the hash draw; None is a fresh one seeded 0.
        buckets: bucket ids to use instead of hashing.
        padding_mask: True at real tokens; outputs elsewhere are 0.
        dropout_p: share of attention weights dropped.
        backend: `auto`, the fastest that can; `native`, a C++ kernel for the CPU that is compiled on first
            use, or `flash`, tile by tile in torch; `triton` or `flex` on a GPU: all of them keep one integer
            a token and round for backward; or `reference`, whole rounds at once, for every mode, type and
            device.

    Raises:
        ValueError: names the value, the rule and the mend.

    Source: Kitaev, Kaiser, Levskaya 2020, §2; differences to published code are the defaults of
    `causality`, `duplicates` and `seams`.
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
    return attend(qk, v, buckets=ids, padding_mask=padding_mask, options=options)


def attend(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    buckets: Int[Tensor, "batch heads n_hashes seq"],
    padding_mask: Bool[Tensor, "batch seq"] | None,
    options: LSHOptions,
) -> Float[Tensor, "batch heads seq value"]:
    """LSH attention on given buckets."""
    check_inputs(qk, v, padding_mask=padding_mask)
    if v.numel() == 0:
        return v.clone()
    dtype, width = torch.promote_types(qk.dtype, v.dtype), max(qk.shape[-1], v.shape[-1])
    backend = options.backend_on(qk.device, dtype=dtype, width=width)
    if backend != "reference":
        # Not compiled: they cut their work by what they find, or are compiled by other means.
        return uncompiled(union.attend)(
            qk,
            v,
            buckets=buckets,
            padding_mask=padding_mask,
            pattern=pattern_of(options, dim=qk.shape[-1]),
            engine=_engine(backend),
            twin=partial(_attend_at_once, options=options),
        )
    return _attend_at_once(qk, v, buckets=buckets, padding_mask=padding_mask, options=options)


def _engine(backend: str) -> union.Engine:
    module, _, name = _ENGINES[backend].partition(".")
    found = import_module(f"reformer.kernels.{module}")
    engine: union.Engine = getattr(found, name) if name else found
    return engine


def pattern_of(options: LSHOptions, *, dim: int) -> union.Pattern:
    """What an engine is told of the options, for vectors of that length."""
    return union.Pattern(
        chunk_length=options.chunk_length,
        before=options.n_chunks_before,
        after=options.after,
        strict=options.strict,
        causal=options.causal,
        count=options.duplicates == "count",
        scale=key_scale(dim, logit_scale=options.logit_scale),
        epsilon=EPSILON,
        dropout_p=options.dropout_p,
    )


def _attend_at_once(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    buckets: Int[Tensor, "batch heads n_hashes seq"],
    padding_mask: Bool[Tensor, "batch seq"] | None,
    options: LSHOptions,
) -> Float[Tensor, "batch heads seq value"]:
    """LSH attention on given buckets, all rounds at once, for every mode: the reference backend."""
    seq, length = qk.shape[-2], options.chunk_length
    real = _real_tokens(qk, padding_mask=padding_mask, chunk_length=length)
    buckets = _with_padding_bucket(buckets, real=real)
    order = sort_by_bucket(buckets)
    keys = unit_keys(qk, logit_scale=options.logit_scale)

    rows = torch.cat([qk, keys.to(qk.dtype)], dim=-1)
    rows = sort_rows(chunking.pad_to_chunks(rows, chunk_length=length), order)
    values = sort_rows(chunking.pad_to_chunks(v, chunk_length=length), order)
    # Rounds lie one after the other on the chunk axis, so that one look-around serves all of them.
    query, key = (merged.flatten(2, 3) for merged in rows.chunk(2, dim=-1))
    out, logsumexp = _attend_chunks(
        chunking.split_chunks(query, chunk_length=length),
        chunking.split_chunks(key, chunk_length=length),
        chunking.split_chunks(values.flatten(2, 3), chunk_length=length),
        buckets=buckets,
        order=order,
        real=real,
        options=options,
    )
    rounds = order.positions.shape[2]
    out = unsort_rows(chunking.merge_chunks(out).unflatten(2, (rounds, -1)), order)
    logsumexp = unsort_rows(logsumexp.unflatten(2, (rounds, -1)).flatten(3, 4).unsqueeze(-1), order).squeeze(
        -1
    )
    combined = combine_rounds(out, logsumexp)[:, :, :seq]
    return combined.masked_fill(~real[:, None, :seq, None], 0.0).to(v.dtype)


def _attend_chunks(
    query: Float[Tensor, "batch heads all_chunks chunk dim"],
    key: Float[Tensor, "batch heads all_chunks chunk dim"],
    values: Float[Tensor, "batch heads all_chunks chunk value"],
    *,
    buckets: Int[Tensor, "batch heads rounds padded"],
    order: SortOrder,
    real: Bool[Tensor, "batch padded"],
    options: LSHOptions,
) -> tuple[
    Float[Tensor, "batch heads all_chunks chunk value"], Float[Tensor, "batch heads all_chunks chunk"]
]:
    """Attention of every chunk over its window, and the log-sum-exp of each row."""
    rounds = order.positions.shape[2]
    chunks = query.shape[2] // rounds
    offsets = _offsets(options, chunks=chunks, rounds=rounds)
    window_keys = chunking.look_around(key, offsets=offsets)
    scores = query @ window_keys.transpose(-1, -2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    windows = Windows(order=order, chunk_length=options.chunk_length, offsets=offsets)
    hidden, own = window_masks(windows, buckets=buckets, real=real, options=options)
    weights, logsumexp = softmax_and_logsumexp(masking.mask_scores(scores, hidden=hidden, own=own))
    weights = F.dropout(weights.to(values.dtype), options.dropout_p, training=options.dropout_p > 0)
    return weights @ chunking.look_around(values, offsets=offsets), logsumexp


def _offsets(options: LSHOptions, *, chunks: int, rounds: int) -> tuple[int, ...]:
    """Chunks that a query's window shows, relative to its own; none of them twice."""
    if not options.wraps:
        return tuple(range(-min(options.n_chunks_before, chunks - 1), min(options.after, chunks - 1) + 1))
    distinct: dict[int, int] = {}
    for offset in range(-options.n_chunks_before, options.after + 1):
        distinct.setdefault(offset % (chunks * rounds), offset)
    return tuple(distinct.values())


def _real_tokens(
    qk: Float[Tensor, "batch heads seq dim"],
    *,
    padding_mask: Bool[Tensor, "batch seq"] | None,
    chunk_length: int,
) -> Bool[Tensor, "batch padded"]:
    batch, _, seq, _ = qk.shape
    if padding_mask is None:
        padding_mask = torch.ones(batch, seq, dtype=torch.bool, device=qk.device)
    missing = chunking.n_chunks(seq, chunk_length=chunk_length) * chunk_length - seq
    return F.pad(padding_mask, (0, missing))


def _with_padding_bucket(
    buckets: Int[Tensor, "batch heads rounds seq"], *, real: Bool[Tensor, "batch padded"]
) -> Int[Tensor, "batch heads rounds padded"]:
    """Put padding into one bucket of its own after all others, where it moves no real token."""
    padded = F.pad(buckets.long(), (0, real.shape[1] - buckets.shape[-1]))
    return padded.masked_fill(~real[:, None, None, :], int(buckets.max()) + 1)
