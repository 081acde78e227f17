"""LSH attention in Triton: one program a tile of the sorted order, a launch a round.

A round shows each token in one slot. So of a launch, one program alone adds to what earlier rounds left of a
token: nothing needs atomics, every run gives the same bits, and no round keeps anything of its own.
Backward sees a tile twice: as the queries of the keys around it, and as the keys of the queries around it.
That gives all that a shared query and key gets from a round in one place.

Keys are never made: the scores of a raw key are multiplied by its norm. Scores and their sums are logarithms
to the base 2.

Tiles are no longer than a chunk, so that little of a window is masked, and set by hand, not tuned.
"""

from __future__ import annotations

import math
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from reformer.kernels.rounds import Kernel, Rounds, key_norms
from reformer.kernels.union import beside

#: The longest tile, and the shortest that a matrix unit takes.
_LONGEST, _SHORTEST = 64, 16
#: Of a tile's rows of one kind: with more, ptxas for sm_90 keeps some of backward outside the registers.
_TILE_BYTES = 2**13
#: The widest row that 4 warps share.
_WARP_BYTES = 256
_LOG2E = tl.constexpr(math.log2(math.e))
#: The log-sum-exp of a row in which no round has shown a key yet.
_NOTHING = tl.constexpr(-1e30)
#: In its place, where that stayed so and a token attends to itself; and of padding. Both hide all pairs.
_ALONE, _PADDING = tl.constexpr(1e30), tl.constexpr(2e30)
_BETWEEN = tl.constexpr(1.5e30)


# What forward and backward share.


@triton.jit
@no_type_check
def _load_rows(first, positions, step, there, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The rows at these positions, filled up with zeros."""
    columns = tl.arange(0, BLOCK)
    places = first + positions[:, None].to(tl.int64) * step + columns[None, :]
    return tl.load(places, mask=there[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
@no_type_check
def _store_rows(first, positions, step, there, rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    places = first + positions[:, None].to(tl.int64) * step + columns[None, :]
    tl.store(places, rows.to(first.dtype.element_ty), mask=there[:, None] & (columns < WIDTH)[None, :])


@triton.jit
@no_type_check
def _slots(order, tile, seq, TILE: tl.constexpr):
    """Positions of a tile's slots, and which of them there are."""
    slots = tile * TILE + tl.arange(0, TILE)
    there = slots < seq
    entries = tl.load(order + slots, mask=there, other=0)
    return tl.where(entries < 0, ~entries, entries), there


@triton.jit
@no_type_check
def _window(tile, seq, CHUNK: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, TILE: tl.constexpr):
    """The tiles, first and one after the last, that the chunks around a tile's chunks lie in."""
    first = tl.maximum(tile * TILE // CHUNK - BEFORE, 0) * CHUNK
    last = tl.minimum(tile * TILE + TILE, seq) - 1
    end = tl.minimum((last // CHUNK + AFTER + 1) * CHUNK, seq)
    return first // TILE, (end + TILE - 1) // TILE


@triton.jit
@no_type_check
def _hide(
    scores, codes, apart, index, query, key, query_there, key_there,
    LOW: tl.constexpr, HIGH: tl.constexpr, HIDDEN: tl.constexpr, STRICT: tl.constexpr,
    CAUSAL: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The scores of the pairs that round `index` shows and, if a pair counts once, no earlier one does."""
    here = codes + tl.cast(index, tl.int64) * apart
    difference = tl.load(here + query, mask=query_there, other=0)
    difference = difference - tl.load(here + key, mask=key_there, other=HIDDEN)
    scores = tl.where((difference >= LOW) & (difference <= HIGH), scores, -float("inf"))
    if not STRICT:
        if CAUSAL:
            scores = tl.where(key < query, scores, -float("inf"))
        else:
            scores = tl.where(key != query, scores, -float("inf"))
    if COUNT:
        for _ in range(index):
            difference = tl.load(codes + query, mask=query_there, other=0)
            difference = difference - tl.load(codes + key, mask=key_there, other=HIDDEN)
            scores = tl.where((difference >= LOW) & (difference <= HIGH), -float("inf"), scores)
            codes += apart
    return scores


@triton.jit
@no_type_check
def _kept(seed, query, key, head, index, dropout_p):
    """What dropout multiplies weights by, the same for a round, a head and positions whenever it is asked."""
    zero = query * 0 + key * 0
    random, _, _, _ = tl.philox(seed, query + zero, key + zero, head + zero, index + zero)
    return tl.where(tl.uint_to_uniform_float(random) >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


# Forward.


@triton.jit(do_not_specialize=["index", "seed"])
@no_type_check
def _forward(
    X, V, NORMS, ORDER, CODES, REAL, SO_FAR, OUT, LOGSUMEXP,
    x_batch, x_head, x_step, v_batch, v_head, v_step, heads, seq, rounds, apart, index, seed, dropout_p,
    DIM: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, HIDDEN: tl.constexpr, STRICT: tl.constexpr,
    CAUSAL: tl.constexpr, COUNT: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, PADDED: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax of a tile's queries, by what this round shows."""
    tiles = tl.cdiv(seq, TILE)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = head.to(tl.int64)
    batch, own_head = row // heads, row % heads
    X += batch * x_batch + own_head * x_head
    V += batch * v_batch + own_head * v_head
    NORMS += row * seq
    LOGSUMEXP += row * seq
    CODES += row * seq
    ORDER += (row * rounds + index) * seq
    # The output lies with its heads beside each other.
    own_out = (batch * seq * heads + own_head) * VALUE
    out_step = heads * VALUE

    query, query_there = _slots(ORDER, tile, seq, TILE)
    x = _load_rows(X, query, x_step, query_there, DIM, BLOCK_D)
    highest = tl.full([TILE], _NOTHING, WIDE)
    total = tl.zeros([TILE], WIDE)
    attended = tl.zeros([TILE, BLOCK_V], WIDE)
    if not FIRST:
        highest = tl.load(LOGSUMEXP + query, mask=query_there, other=_NOTHING)
        total = tl.where(highest <= 0.5 * _NOTHING, 0.0, 1.0).to(WIDE)
        attended = _load_rows(SO_FAR + own_out, query, out_step, query_there, VALUE, BLOCK_V)

    first, end = _window(tile, seq, CHUNK, BEFORE, AFTER, TILE)
    for other in range(first, end):
        key, key_there = _slots(ORDER, other, seq, TILE)
        keys = _load_rows(X, key, x_step, key_there, DIM, BLOCK_D)
        norms = tl.load(NORMS + key, mask=key_there, other=0.0)
        scores = tl.dot(x, tl.trans(keys), input_precision=PRECISION, out_dtype=WIDE)
        scores = _hide(
            scores * (norms * (SCALE * _LOG2E))[None, :], CODES, apart, index,
            query[:, None], key[None, :], query_there[:, None], key_there[None, :],
            LOW, HIGH, HIDDEN, STRICT, CAUSAL, COUNT,
        )  # fmt: skip
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 1)
        if DROPOUT:
            weights = weights * _kept(seed, query[:, None], key[None, :], head, index, dropout_p)
        values = _load_rows(V, key, v_step, key_there, VALUE, BLOCK_V)
        attended = attended * shrink[:, None]
        attended += tl.dot(weights.to(values.dtype), values, input_precision=PRECISION, out_dtype=WIDE)
        highest = higher

    alone = total == 0
    total = tl.where(alone, 1.0, total)
    attended = attended / total[:, None]
    logsumexp = tl.where(alone, _NOTHING, highest + tl.log2(total))
    if LAST:
        own = _load_rows(V, query, v_step, query_there & alone, VALUE, BLOCK_V).to(WIDE)
        if DROPOUT:
            own = own * _kept(seed, query, query, head, index, dropout_p)[:, None]
        attended = tl.where(alone[:, None], own, attended)
        logsumexp = tl.where(alone, _ALONE, logsumexp)
        if PADDED:
            real = tl.load(REAL + batch * seq + query, mask=query_there, other=0) != 0
            attended = tl.where(real[:, None], attended, 0.0)
            logsumexp = tl.where(real, logsumexp, _PADDING)
        _store_rows(OUT + own_out, query, out_step, query_there, attended, VALUE, BLOCK_V)
    else:
        _store_rows(SO_FAR + own_out, query, out_step, query_there, attended, VALUE, BLOCK_V)
    tl.store(LOGSUMEXP + query, logsumexp.to(WIDE), mask=query_there)


# Backward.


@triton.jit
@no_type_check
def _delta(
    OUT, DOUT, LOGSUMEXP, DELTA, d_batch, d_head, d_step, heads, seq,
    VALUE: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Row by row, output times its gradient: what the gradient of each weight is compared with."""
    tiles = tl.cdiv(seq, TILE)
    head, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    batch, own_head = head // heads, head % heads
    positions = tile * TILE + tl.arange(0, TILE)
    there = positions < seq
    logsumexp = tl.load(LOGSUMEXP + head * seq + positions, mask=there, other=_PADDING)
    there = there & (logsumexp < _BETWEEN)
    OUT += (batch * seq * heads + own_head) * VALUE
    DOUT += batch * d_batch + own_head * d_head
    out = _load_rows(OUT, positions, heads * VALUE, there, VALUE, BLOCK_V)
    dout = _load_rows(DOUT, positions, d_step, there, VALUE, BLOCK_V)
    delta = tl.sum(out.to(WIDE) * dout.to(WIDE), 1)
    tl.store(DELTA + head * seq + positions, delta, mask=positions < seq)


@triton.jit(do_not_specialize=["index", "seed"])
@no_type_check
def _backward(
    X, V, NORMS, ORDER, CODES, LOGSUMEXP, DOUT, DELTA, DX_SO_FAR, DV_SO_FAR, DX, DV,
    x_batch, x_head, x_step, v_batch, v_head, v_step, d_batch, d_head, d_step,
    heads, seq, rounds, apart, index, seed, dropout_p,
    DIM: tl.constexpr, VALUE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    TILE: tl.constexpr, CHUNK: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, HIDDEN: tl.constexpr, STRICT: tl.constexpr,
    CAUSAL: tl.constexpr, COUNT: tl.constexpr, SCALE: tl.constexpr, DROPOUT: tl.constexpr,
    FIRST: tl.constexpr, LAST: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to a tile's gradients what this round gives, to its rows as queries and as keys."""
    tiles = tl.cdiv(seq, TILE)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    row = head.to(tl.int64)
    batch, own_head = row // heads, row % heads
    X += batch * x_batch + own_head * x_head
    V += batch * v_batch + own_head * v_head
    DOUT += batch * d_batch + own_head * d_head
    NORMS += row * seq
    LOGSUMEXP += row * seq
    DELTA += row * seq
    CODES += row * seq
    ORDER += (row * rounds + index) * seq

    own, there = _slots(ORDER, tile, seq, TILE)
    x = _load_rows(X, own, x_step, there, DIM, BLOCK_D)
    v = _load_rows(V, own, v_step, there, VALUE, BLOCK_V)
    norm = tl.load(NORMS + own, mask=there, other=0.0)
    logsumexp = tl.load(LOGSUMEXP + own, mask=there, other=_PADDING)
    # Of padding there may be no telling what the gradient is.
    dout = _load_rows(DOUT, own, d_step, there & (logsumexp < _BETWEEN), VALUE, BLOCK_V)
    delta = tl.load(DELTA + own, mask=there, other=0.0)

    # As queries.
    dx = tl.zeros([TILE, BLOCK_D], WIDE)
    first, end = _window(tile, seq, CHUNK, BEFORE, AFTER, TILE)
    for other in range(first, end):
        key, key_there = _slots(ORDER, other, seq, TILE)
        keys = _load_rows(X, key, x_step, key_there, DIM, BLOCK_D)
        norms = tl.load(NORMS + key, mask=key_there, other=0.0) * SCALE
        scores = tl.dot(x, tl.trans(keys), input_precision=PRECISION, out_dtype=WIDE)
        scores = _hide(
            scores * (norms * _LOG2E)[None, :] - logsumexp[:, None], CODES, apart, index,
            own[:, None], key[None, :], there[:, None], key_there[None, :],
            LOW, HIGH, HIDDEN, STRICT, CAUSAL, COUNT,
        )  # fmt: skip
        weights = tl.exp2(scores)
        values = _load_rows(V, key, v_step, key_there, VALUE, BLOCK_V)
        dweights = tl.dot(dout, tl.trans(values), input_precision=PRECISION, out_dtype=WIDE)
        if DROPOUT:
            dweights = dweights * _kept(seed, own[:, None], key[None, :], head, index, dropout_p)
        dscores = weights * (dweights - delta[:, None]) * norms[None, :]
        dx += tl.dot(dscores.to(keys.dtype), keys, input_precision=PRECISION, out_dtype=WIDE)

    # As keys. What sees a tile lies the other way.
    dkeys = tl.zeros([TILE, BLOCK_D], WIDE)
    dv = tl.zeros([TILE, BLOCK_V], WIDE)
    first, end = _window(tile, seq, CHUNK, AFTER, BEFORE, TILE)
    for other in range(first, end):
        query, query_there = _slots(ORDER, other, seq, TILE)
        queries = _load_rows(X, query, x_step, query_there, DIM, BLOCK_D)
        sums = tl.load(LOGSUMEXP + query, mask=query_there, other=_PADDING)
        scores = tl.dot(x, tl.trans(queries), input_precision=PRECISION, out_dtype=WIDE)
        scores = _hide(
            scores * (norm * (SCALE * _LOG2E))[:, None] - sums[None, :], CODES, apart, index,
            query[None, :], own[:, None], query_there[None, :], there[:, None],
            LOW, HIGH, HIDDEN, STRICT, CAUSAL, COUNT,
        )  # fmt: skip
        weights = tl.exp2(scores)
        deltas = tl.load(DELTA + query, mask=query_there, other=0.0)
        douts = _load_rows(DOUT, query, d_step, query_there & (sums < _BETWEEN), VALUE, BLOCK_V)
        dweights = tl.dot(v, tl.trans(douts), input_precision=PRECISION, out_dtype=WIDE)
        kept_weights = weights
        if DROPOUT:
            kept = _kept(seed, query[None, :], own[:, None], head, index, dropout_p)
            kept_weights = weights * kept
            dweights = dweights * kept
        dv += tl.dot(kept_weights.to(douts.dtype), douts, input_precision=PRECISION, out_dtype=WIDE)
        dscores = weights * (dweights - deltas[None, :])
        dkeys += tl.dot(dscores.to(queries.dtype), queries, input_precision=PRECISION, out_dtype=WIDE)

    # Keys are x·n·scale with n = (mean x² + ε)^(−½), whose gradient is −n³·x/dim.
    along = tl.sum(dkeys * x, 1) * norm * norm * norm * (SCALE / DIM)
    dx += dkeys * (norm * SCALE)[:, None] - x * along[:, None]
    own_x, x_out_step = (batch * seq * heads + own_head) * DIM, heads * DIM
    own_v, v_out_step = (batch * seq * heads + own_head) * VALUE, heads * VALUE
    if not FIRST:
        dx += _load_rows(DX_SO_FAR + own_x, own, x_out_step, there, DIM, BLOCK_D)
        dv += _load_rows(DV_SO_FAR + own_v, own, v_out_step, there, VALUE, BLOCK_V)
    if LAST:
        alone = (logsumexp >= 0.5 * _ALONE) & (logsumexp < _BETWEEN)
        share = dout.to(WIDE)
        if DROPOUT:
            share = share * _kept(seed, own, own, head, index, dropout_p)[:, None]
        dv += tl.where(alone[:, None], share, 0.0)
        _store_rows(DX + own_x, own, x_out_step, there, dx, DIM, BLOCK_D)
        _store_rows(DV + own_v, own, v_out_step, there, dv, VALUE, BLOCK_V)
    else:
        _store_rows(DX_SO_FAR + own_x, own, x_out_step, there, dx, DIM, BLOCK_D)
        _store_rows(DV_SO_FAR + own_v, own, v_out_step, there, dv, VALUE, BLOCK_V)


# Launching.


def forward(
    qk: Float[Tensor, "batch heads seq dim"], v: Float[Tensor, "batch heads seq value"], rounds: Rounds
) -> tuple[Float[Tensor, "batch heads seq value"], Float[Tensor, "batch heads seq"]]:
    """The output, and of each row the base-2 log-sum-exp or what stands for padding and being alone."""
    qk, v = _rows(qk), _rows(v)
    wide = _wide(qk)
    norms, codes = key_norms(qk, pattern=rounds.pattern, dtype=wide), rounds.codes()
    out, logsumexp = beside(v, dtype=v.dtype), torch.empty_like(norms)
    so_far = _accumulator(out, rounds, wide=wide)
    real = logsumexp if rounds.real is None else rounds.real.contiguous().view(torch.uint8)
    settings, programs = _settings(qk, v, rounds)
    with torch.cuda.device_of(qk):
        for index in range(len(codes)):
            _forward[(programs,)](
                qk, v, norms, rounds.order, codes, real, so_far, out, logsumexp,
                *qk.stride()[:3], *v.stride()[:3], *_sizes(rounds), index, rounds.seed,
                rounds.pattern.dropout_p,
                FIRST=index == 0, LAST=index == len(codes) - 1, PADDED=rounds.real is not None, **settings,
            )  # fmt: skip
    return out, logsumexp


def backward(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    rounds: Rounds,
    *,
    out: Float[Tensor, "batch heads seq value"],
    logsumexp: Float[Tensor, "batch heads seq"],
    dout: Float[Tensor, "batch heads seq value"],
) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq value"]]:
    """The gradients of qk and v."""
    qk, v, dout = _rows(qk), _rows(v), _rows(dout)
    wide = logsumexp.dtype
    # Before there are gradients: codes take some room to be made.
    norms, codes = key_norms(qk, pattern=rounds.pattern, dtype=wide), rounds.codes()
    delta = torch.empty_like(logsumexp)
    dqk, dv = beside(qk, dtype=qk.dtype), beside(v, dtype=v.dtype)
    dqk_so_far, dv_so_far = (_accumulator(x, rounds, wide=wide) for x in (dqk, dv))
    settings, programs = _settings(qk, v, rounds)
    with torch.cuda.device_of(qk):
        _delta[(programs,)](
            out, dout, logsumexp, delta, *dout.stride()[:3], *_sizes(rounds)[:2],
            **{name: settings[name] for name in ("VALUE", "BLOCK_V", "TILE", "WIDE")},
        )  # fmt: skip
        for index in range(len(codes)):
            _backward[(programs,)](
                qk, v, norms, rounds.order, codes, logsumexp, dout, delta, dqk_so_far, dv_so_far, dqk, dv,
                *qk.stride()[:3], *v.stride()[:3], *dout.stride()[:3], *_sizes(rounds), index, rounds.seed,
                rounds.pattern.dropout_p,
                FIRST=index == 0, LAST=index == len(codes) - 1, **settings,
            )  # fmt: skip
    return dqk, dv


KERNEL = Kernel(attend=forward, differentiate=backward)


def _rows(x: Float[Tensor, "batch heads seq any"]) -> Float[Tensor, "batch heads seq any"]:
    """The same, the numbers of a row one after the other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _accumulator(result: Tensor, rounds: Rounds, *, wide: torch.dtype) -> Tensor:
    """Where rounds add up, in a type that bears it; what is made in one go needs no such place."""
    if result.dtype == wide or rounds.order.shape[2] == 1:
        return result
    return beside(result, dtype=wide)


def _sizes(rounds: Rounds) -> tuple[int, int, int, int]:
    """Heads, tokens, rounds, and how far apart rounds lie among the codes."""
    batch, heads, count, seq = rounds.order.shape
    return heads, seq, count, batch * heads * seq


def _settings(qk: Tensor, v: Tensor, rounds: Rounds) -> tuple[dict[str, Any], int]:
    """What a program is compiled for, and how many programs a launch has."""
    batch, heads, seq, dim = qk.shape
    pattern, value = rounds.pattern, v.shape[-1]
    low, high = pattern.span
    blocks = [max(_SHORTEST, triton.next_power_of_2(width)) for width in (dim, value)]
    row_bytes = max(blocks) * max(qk.element_size(), v.element_size())
    tile = _tile(pattern.chunk_length, row_bytes=row_bytes)
    exact = torch.get_float32_matmul_precision() == "highest"
    # Exact products of float32 are made outside of the matrix units, in many more registers; what draws
    # random numbers needs more, too.
    many_warps = row_bytes > _WARP_BYTES or (exact and qk.dtype == torch.float32) or pattern.dropout_p > 0
    settings = {
        "DIM": dim, "VALUE": value, "BLOCK_D": blocks[0], "BLOCK_V": blocks[1], "TILE": tile,
        "CHUNK": pattern.chunk_length, "BEFORE": pattern.before, "AFTER": pattern.after,
        "LOW": low, "HIGH": high, "HIDDEN": rounds.hidden, "STRICT": pattern.strict,
        "CAUSAL": pattern.causal, "COUNT": pattern.count, "SCALE": pattern.scale,
        "DROPOUT": pattern.dropout_p > 0,
        "WIDE": tl.float64 if _wide(qk) == torch.float64 else tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 8 if many_warps else 4, "num_stages": 2,
    }  # fmt: skip
    return settings, batch * heads * triton.cdiv(seq, tile)


def _tile(chunk_length: int, *, row_bytes: int) -> int:
    """Slots a tile: no more than a chunk has, if a matrix unit takes as few, and their rows fit."""
    fits = max(_SHORTEST, min(_LONGEST, _TILE_BYTES // row_bytes))
    return min(fits, max(_SHORTEST, 1 << (chunk_length.bit_length() - 1)))
