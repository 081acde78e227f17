"""LSH attention tile by tile: one softmax over all rounds, and for backward one integer a token and round.

A *tape* is the tokens of some heads in the order of a round, head by head, filled up to whole chunks each. A
gap between batch rows keeps what is no number in one from the others.
Heads are taken in *blocks*, so that a tape is no longer than need be, and chunks in *groups*, so that the
scores of a group stay in the cache.

What a query may see is decided by subtracting *codes*, one number a token (`reformer.attention.masking`): in
floats, since comparisons that make booleans cost several times as much. Codes are scaled by a power of two so
large that the square of a difference is a penalty at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.kernels.union import Attended, Pattern, beside, read_order

#: Pairs a group: few enough to stay in the cache, enough to be worth starting an operator on.
PAIRS = 2**19
#: Rows of the tape of a block of heads; of one head, if it is longer.
ROWS = 2**13
#: By what codes are multiplied, and what its square hides: exact in floats, as it is a power of two.
_UNIT = 2.0**50
_HIDDEN = -(2.0**108)
#: A log-sum-exp of less is that of a row in which all is hidden.
_ALONE = -1e28
#: Scores and their sums are logarithms to the base 2: torch's exp2 is three times as fast as its exp, also
#: where it underflows.
_LOG2E = math.log2(math.e)
#: Floats are exact integers up to here.
_EXACT = {torch.float32: 2**24, torch.float64: 2**53}


def forward(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    buckets: Int[Tensor, "batch heads rounds seq"],
    real: Bool[Tensor, "batch seq"] | None,
    pattern: Pattern,
    seed: int,
) -> Attended:
    """Attend; `seed` is that of dropout."""
    wide = torch.promote_types(qk.dtype, torch.float32)
    order = torch.empty(buckets.shape, dtype=torch.int32)
    out = beside(v)
    logsumexp = torch.empty(qk.shape[:3], dtype=wide)
    for block in _blocks(qk, v, real=real, pattern=pattern, seed=seed):
        block.sort(buckets, order=order)
        block.forward(order, out=out, logsumexp=logsumexp)
    return Attended(out, logsumexp, order)


def backward(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    attended: Attended,
    *,
    dout: Float[Tensor, "batch heads seq value"],
    real: Bool[Tensor, "batch seq"] | None,
    pattern: Pattern,
    seed: int,
) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq value"]]:
    """Gradients by queries-and-keys, and by values."""
    dqk, dv = beside(qk), beside(v)
    for block in _blocks(qk, v, real=real, pattern=pattern, seed=seed):
        block.backward(attended, dout=dout, dqk=dqk, dv=dv)
    return dqk, dv


def _blocks(qk: Tensor, v: Tensor, *, real: Tensor | None, pattern: Pattern, seed: int) -> Iterator[_Block]:
    """All heads, in blocks: some of one batch row, or all of several."""
    batch, heads, seq, _ = qk.shape
    fits = max(1, ROWS // max(1, seq))
    row_step, head_step = (fits // heads, heads) if fits >= heads else (1, fits)
    scratch = _Scratch()
    layouts = (_Layout.of(qk), _Layout.of(v))
    for row in range(0, batch, row_step):
        for head in range(0, heads, head_step):
            part = (slice(row, row + row_step), slice(head, head + head_step))
            rows = [_Rows(layout, x, part) for layout, x in zip(layouts, (qk, v), strict=True)]
            yield _Block(qk, v, rows=rows, part=part, real=real, pattern=pattern, seed=seed, scratch=scratch)


class _Scratch:
    """Memory that is used again and again: pages that nobody has touched yet are slow."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def room(self, name: str, *size: int, dtype: torch.dtype) -> Tensor:
        """Room of that size under that name, with anything in it; what had the name before is gone."""
        needed = math.prod(size)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < needed:
            held = self._held[name, dtype] = torch.empty(needed, dtype=dtype)
        return held[:needed].view(size)


@dataclass(frozen=True)
class _Layout:
    """Vectors as rows that can be picked by number, and how many rows apart batch rows, heads, tokens lie."""

    flat: Float[Tensor, "rows dim"]
    steps: tuple[int, int, int]

    @classmethod
    def of(cls, x: Float[Tensor, "batch heads seq dim"]) -> _Layout:
        """Without a copy where heads lie beside each other in memory, or one after the other."""
        _, heads, seq, dim = x.shape
        beside = x.transpose(1, 2)
        if beside.is_contiguous():
            return cls(beside.reshape(-1, dim), (seq * heads, 1, heads))
        return cls(x.contiguous().reshape(-1, dim), (heads * seq, seq, 1))


class _Rows:
    """Vectors of a block as rows that can be picked by number."""

    def __init__(self, layout: _Layout, x: Tensor, part: tuple[slice, slice]) -> None:
        batch, heads = x.shape[:2]
        row_step, head_step, self.step = layout.steps
        rows = torch.arange(batch)[part[0], None] * row_step + torch.arange(heads)[part[1]] * head_step
        self.flat, self.first = layout.flat, rows.flatten()

    def ids(self, positions: Int[Tensor, "tapes seq"]) -> Int[Tensor, "tapes seq"]:
        """Numbers of the rows at these positions of each head."""
        return self.first[:, None] + positions * self.step

    def pick(self, ids: Int[Tensor, " rows"], *, room: Tensor) -> Tensor:
        """The rows of these numbers, in the type of the room."""
        if room.dtype == self.flat.dtype:
            return torch.index_select(self.flat, 0, ids, out=room)
        return room.copy_(self.flat.index_select(0, ids))


@dataclass(frozen=True)
class _Round:
    """A round of a block. A value *around* is one of each slot and of the chunks that the outer ones see.

    Args:
        slots: slot of each token; tokens are numbered head by head.
        tokens: token of each slot; one after the last where there is none.
        qk_rows: row of each slot among the queries and keys.
        v_rows: among the values.
        places: what says where a slot stands, if that can hide it.
        codes: what says which slots see each other.
        earlier: codes in the rounds before, where a pair counts once.
    """

    index: int
    slots: Int[Tensor, " tokens"]
    tokens: Int[Tensor, " slots"]
    qk_rows: Int[Tensor, " around"]
    v_rows: Int[Tensor, " around"]
    places: Float[Tensor, " around"]
    codes: Float[Tensor, " around"]
    earlier: tuple[Float[Tensor, " around"], ...]


@dataclass(frozen=True)
class _Group:
    """Some chunks of a round, `first` up to `end`, with the rows that they look at; `x` are the queries."""

    first: int
    end: int
    x: Float[Tensor, "rows dim"]
    keys: Float[Tensor, "rows dim"]
    values: Float[Tensor, "rows value"]
    #: By what the rows are multiplied to make keys of length √dim.
    norms: Float[Tensor, "rows 1"]

    @property
    def n_chunks(self) -> int:
        return self.end - self.first


class _Block:
    """Some heads of some batch rows."""

    def __init__(
        self,
        qk: Tensor,
        v: Tensor,
        *,
        rows: Sequence[_Rows],
        part: tuple[slice, slice],
        real: Tensor | None,
        pattern: Pattern,
        seed: int,
        scratch: _Scratch,
    ) -> None:
        self.part, self.pattern, self.seed, self.scratch = part, pattern, seed, scratch
        self.batch, self.heads, self.seq, self.dim = qk[part].shape
        self.value = v.shape[-1]
        self.real = None if real is None else real[part[0]]
        self.wide = torch.promote_types(qk.dtype, torch.float32)
        self.tapes = self.batch * self.heads
        self.tape_chunks = -(-self.seq // pattern.chunk_length)
        self.filled = self.tape_chunks * pattern.chunk_length
        gap = pattern.views - 1
        self.row_chunks = self.heads * self.tape_chunks
        self.step = self.row_chunks + gap
        self.chunks = self.batch * self.step - gap
        self.qk, self.v = rows
        self.number = part[0].start * qk.shape[1] + part[1].start

    # Rounds.

    def sort(self, buckets: Tensor, *, order: Tensor) -> None:
        """Sort each round by (head, bucket, position). An entry ~p is position p where a bucket starts."""
        mine = buckets[self.part]
        mine = mine.long() - mine.min()
        if self.real is not None:
            # Padding has a bucket of its own, after all others.
            mine = mine.masked_fill(~self.real[:, None, None], int(mine.max()) + 1)
        head = torch.arange(self.tapes)[:, None] * (int(mine.max()) + 1)
        for index in range(mine.shape[2]):
            # One flat sort of integers is a radix sort.
            keys = (mine[:, :, index].reshape(self.tapes, self.seq) + head).flatten()
            keys, positions = torch.sort(keys, stable=True)
            positions = (positions % self.seq).int()
            starts = torch.ones_like(keys, dtype=torch.bool)
            torch.ne(keys[1:], keys[:-1], out=starts[1:])
            positions = torch.where(starts, ~positions, positions)
            order[self.part][:, :, index] = positions.view(self.batch, self.heads, self.seq)

    def rounds(self, order: Tensor) -> Iterator[_Round]:
        """The rounds in turn."""
        first = torch.arange(self.batch)[:, None] * self.step + torch.arange(self.heads) * self.tape_chunks
        slot = first.view(-1, 1) * self.pattern.chunk_length + torch.arange(self.seq)
        earlier: list[Tensor] = []
        for index in range(order.shape[2]):
            positions, starts = read_order(order[self.part][:, :, index].reshape(self.tapes, self.seq))
            tokens = positions + torch.arange(self.tapes)[:, None] * self.seq
            slots = torch.empty(tokens.numel(), dtype=torch.int64)
            slots[tokens.flatten()] = slot.flatten()
            codes = self._codes(slot, starts=starts)
            tape = torch.full((self.chunks * self.pattern.chunk_length,), tokens.numel())
            tape[slot] = tokens
            yield _Round(
                index=index,
                slots=slots,
                tokens=tape,
                qk_rows=self._around(self.qk.ids(positions)),
                v_rows=self._around(self.v.ids(positions)),
                places=self._places(positions),
                codes=self._around(codes, fill=-4 * (self.pattern.span[1] + 1) * _UNIT),
                earlier=tuple(self._around(before[tokens]) for before in earlier),
            )
            if self.pattern.count:
                by_token = torch.empty(tokens.numel(), dtype=codes.dtype)
                by_token[tokens.flatten()] = codes.flatten()
                earlier.append(by_token)

    def _around(self, x: Tensor, *, fill: float | None = None) -> Tensor:
        """A value of each token as one around; elsewhere `fill`, or a value of the same head or batch row."""
        chunk = self.pattern.chunk_length
        heads = _extend(x, 0, self.filled - self.seq, fill=fill).view(self.batch, -1)
        rows = _extend(heads, self.pattern.before * chunk, self.pattern.after * chunk, fill=fill)
        return rows.flatten()

    def _codes(self, slot: Tensor, *, starts: Tensor) -> Tensor:
        """By slot and bucket if strict, the ranks of buckets going on from head to head; else by chunk."""
        if self.pattern.strict:
            ranks = starts.flatten().cumsum(0).view_as(starts)
            codes = slot + ranks * (self.pattern.span[1] + 1)
        else:
            codes = slot // self.pattern.chunk_length
        exact = self.wide if int(codes[-1, -1]) < _EXACT[self.wide] else torch.float64
        return codes.to(exact) * _UNIT

    def _places(self, positions: Tensor) -> Tensor:
        """Positions, scaled, those of padding after all others; if not causal, what padding is hidden by."""
        if self.pattern.causal:
            exact = self.wide if self.seq < _EXACT[self.wide] else torch.float64
            places, nowhere = positions.to(exact) * _UNIT**2, float(self.seq) * _UNIT**2
        else:
            places, nowhere = torch.zeros(positions.shape, dtype=self.wide), _HIDDEN
        if self.real is not None:
            real = self.real[:, None].expand(-1, self.heads, -1).reshape(self.tapes, self.seq)
            places = places.masked_fill(~real.gather(1, positions), nowhere)
        return self._around(places, fill=nowhere)

    # Groups of chunks.

    def groups(self, here: _Round) -> Iterator[_Group]:
        """The chunks of a tape, a group at a time."""
        chunk, views = self.pattern.chunk_length, self.pattern.views
        size = max(1, PAIRS // (chunk * chunk * views))
        for first in range(0, self.chunks, size):
            end = min(first + size, self.chunks)
            count = (end - first + views - 1) * chunk
            rows = slice(first * chunk, first * chunk + count)
            x = self.qk.pick(here.qk_rows[rows], room=self.room("x", count, self.dim))
            values = self.v.pick(here.v_rows[rows], room=self.room("values", count, self.value))
            keys = self.room("keys", count, self.dim)
            squares = torch.mul(x, x, out=keys).sum(dim=-1, keepdim=True)
            norms = squares.div_(self.dim).add_(self.pattern.epsilon).rsqrt_()
            keys = torch.mul(x, norms * (self.pattern.scale * _LOG2E), out=keys)
            yield _Group(first, end, x, keys, values, norms)

    def rows(self, group: _Group) -> slice:
        """The rows of a group, among those around the tape."""
        chunk = self.pattern.chunk_length
        return slice(group.first * chunk, (group.end + self.pattern.views - 1) * chunk)

    def slots(self, group: _Group) -> slice:
        """The slots of a group on the tape."""
        return slice(group.first * self.pattern.chunk_length, group.end * self.pattern.chunk_length)

    def room(self, name: str, *size: int) -> Tensor:
        """Scratch memory in the type that is computed in."""
        return self.scratch.room(name, *size, dtype=self.wide)

    def queries(self, x: Tensor, group: _Group) -> Tensor:
        """What the own slots of a group hold, of what its rows hold, by chunk."""
        chunk = self.pattern.chunk_length
        start = self.pattern.before * chunk
        own: Tensor = x[start : start + group.n_chunks * chunk].unflatten(0, (-1, chunk))
        return own

    def windows(self, x: Tensor, group: _Group) -> Tensor:
        """What each chunk of a group sees, of what its rows hold: overlapping views of one memory."""
        chunk, step = self.pattern.chunk_length, x.stride(0)
        size = (group.n_chunks, self.pattern.views * chunk, *x.shape[1:])
        seen: Tensor = x.as_strided(size, (chunk * step, step, *x.stride()[1:]))
        return seen

    def bias(self, group: _Group, here: _Round, *, out: Tensor) -> Tensor:
        """0 where a group's queries see a key, a large negative number elsewhere."""
        rows = self.rows(group)
        if self.pattern.strict:
            difference, limit = self._differences(here.codes[rows], group)
            bias = torch.addcmul(limit, difference, difference, value=-1, out=out)
        else:
            places = here.places[rows]
            keys = self.windows(places, group).unsqueeze(1)
            if self.pattern.causal:
                # Its own place hides a key, too.
                bias = torch.sub(self.queries(places - _UNIT**2, group).unsqueeze(-1), keys, out=out)
            else:
                bias = out.copy_(keys.expand_as(out))
                own = self.pattern.before * self.pattern.chunk_length
                bias[:, :, own:].diagonal(dim1=1, dim2=2).fill_(_HIDDEN)
            self._hide_edges(bias, group)
        for codes in here.earlier:
            difference, limit = self._differences(codes[rows], group)
            seen = torch.addcmul(-limit, difference, difference, out=difference)
            bias = torch.minimum(bias, seen, out=out)
        return bias.clamp_(min=_HIDDEN, max=0)

    def _differences(self, codes: Tensor, group: _Group) -> tuple[Tensor, Tensor]:
        """Differences from the middle of what is visible, and the square of half its width."""
        low, high = self.pattern.span
        queries = self.queries(codes - (low + high) / 2 * _UNIT, group).unsqueeze(-1)
        keys = self.windows(codes, group).unsqueeze(1)
        # Differences are whole numbers and a half, or whole ones: nothing lies on this limit.
        limit = torch.tensor(((high - low + 1) / 2 * _UNIT) ** 2, dtype=codes.dtype)
        size = (group.n_chunks, self.pattern.chunk_length, keys.shape[-1])
        room = self.scratch.room("difference", *size, dtype=codes.dtype)
        return torch.sub(queries, keys, out=room), limit

    def _hide_edges(self, bias: Tensor, group: _Group) -> None:
        """Chunk windows end where a head does."""
        own = torch.arange(group.first, group.end) % self.step % self.tape_chunks
        by_view = bias.unflatten(-1, (self.pattern.views, -1))
        for view in range(self.pattern.views):
            seen = own + (view - self.pattern.before)
            beyond = (seen < 0) | (seen >= self.tape_chunks)
            if bool(beyond.any()):
                by_view[beyond, :, view] = _HIDDEN

    def keep(self, group: _Group, here: _Round, *, size: torch.Size) -> Tensor:
        """What dropout multiplies a group's weights by, the same whenever it is asked."""
        number = (self.number * 2**20 + here.index) * 2**24 + group.first
        return self._drawn(number * 0x9E3779B97F4A7C15, size=size)

    def _drawn(self, number: int, *, size: torch.Size) -> Tensor:
        """0 where something is dropped, elsewhere what makes up for it."""
        random = torch.Generator().manual_seed((self.seed + number) % 2**63)
        kept = 1 - self.pattern.dropout_p
        return torch.empty(size, dtype=self.wide).bernoulli_(kept, generator=random).div_(kept)

    def scores(self, group: _Group, here: _Round) -> Tensor:
        chunk = self.pattern.chunk_length
        size = (group.n_chunks, chunk, self.pattern.views * chunk)
        out = self.scratch.room("scores", *size, dtype=here.codes.dtype)
        bias = self.bias(group, here, out=out).to(self.wide)
        return bias.baddbmm_(self.queries(group.x, group), self.windows(group.keys, group).mT)

    # Forward.

    def forward(self, order: Tensor, *, out: Tensor, logsumexp: Tensor) -> None:
        """Attend, and write the results where they belong."""
        count = self.chunks * self.pattern.chunk_length
        rooms = [self.room(name, count, self.value) for name in ("attended", "attended before")]
        sums = self.room("sums", count)
        attended = rooms[0]
        before: _Round | None = None
        for here in self.rounds(order):
            if before is not None:
                moved = F.pad(before.slots, (0, 1))[here.tokens]
                attended = torch.index_select(attended, 0, moved, out=rooms[here.index % 2])
                sums = sums.index_select(0, moved)
            for group in self.groups(here):
                part, sum_part = self._attend(group, here)
                slots = self.slots(group)
                if before is None:
                    attended[slots], sums[slots] = part, sum_part
                else:
                    _merge(attended[slots], sums[slots], part, sum_part)
            before = here
        assert before is not None
        room = self.room("by token", len(before.slots), self.value)
        attended = torch.index_select(attended, 0, before.slots, out=room)
        sums = sums.index_select(0, before.slots)
        self._see_to_lonely(attended, sums)
        attended = attended.view(self.batch, self.heads, self.seq, self.value)
        if self.real is not None:
            attended = attended.masked_fill_(~self.real[:, None, :, None], 0)
        out[self.part] = attended
        logsumexp[self.part] = sums.view(self.batch, self.heads, self.seq)

    def _attend(self, group: _Group, here: _Round) -> tuple[Tensor, Tensor]:
        scores = self.scores(group, here)
        highest = scores.amax(dim=-1, keepdim=True)
        weights = scores.sub_(highest).exp2_()
        total = weights.sum(dim=-1, keepdim=True)
        sums = highest.add_(total.log2())
        if self.pattern.dropout_p:
            weights.mul_(self.keep(group, here, size=weights.shape))
        room = self.room("part", *weights.shape[:2], self.value)
        part = torch.bmm(weights, self.windows(group.values, group), out=room).div_(total)
        return part.flatten(0, 1), sums.flatten()

    def _see_to_lonely(self, attended: Tensor, sums: Tensor) -> None:
        """Where all was hidden, a token attends to itself. Its sum then hides every pair from backward."""
        alone = (sums < _ALONE).nonzero().squeeze(-1)
        if alone.numel():
            attended[alone] = self._own_values(alone)
            sums[alone] = -_HIDDEN

    def _own_values(self, tokens: Tensor) -> Tensor:
        head, position = tokens // self.seq, tokens % self.seq
        rows = self.v.first[head] + position * self.v.step
        return self.v.flat.index_select(0, rows).to(self.wide) * self._keep_lonely(tokens)

    def _keep_lonely(self, tokens: Tensor) -> Tensor:
        if not self.pattern.dropout_p:
            return torch.ones(1, dtype=self.wide)
        every = self._drawn(~self.number, size=torch.Size([self.tapes * self.seq]))
        return every[tokens].unsqueeze(-1)

    # Backward.

    def backward(self, attended: Attended, *, dout: Tensor, dqk: Tensor, dv: Tensor) -> None:
        """Write the gradients of the block's rows."""
        upstream = dout[self.part].to(self.wide)
        if self.real is not None:
            upstream = upstream.masked_fill(~self.real[:, None, :, None], 0)
        delta = (upstream * attended.out[self.part]).sum(-1).flatten()
        # One row more: what fills up a chunk asks for nothing, and sees nothing.
        upstream = F.pad(upstream.reshape(-1, self.value), (0, 0, 0, 1))
        delta = F.pad(delta, (0, 1))
        sums = F.pad(attended.logsumexp[self.part].flatten(), (0, 1), value=-_HIDDEN)
        dqk_sum = self.room("dqk", self.tapes * self.seq, self.dim).zero_()
        dv_sum = self.room("dv", self.tapes * self.seq, self.value).zero_()
        around = (self.pattern.views - 1 + self.chunks) * self.pattern.chunk_length
        own = slice(self.pattern.before * self.pattern.chunk_length, None)
        for here in self.rounds(attended.order):
            dx_tape = self.room("dx tape", around, self.dim).zero_()
            dv_tape = self.room("dv tape", around, self.value).zero_()
            for group in self.groups(here):
                tokens = here.tokens[self.slots(group)]
                rows = self.rows(group)
                self._backward(
                    group,
                    here,
                    dout=torch.index_select(
                        upstream, 0, tokens, out=self.room("dout", len(tokens), self.value)
                    ).unflatten(0, (group.n_chunks, -1)),
                    sums=sums[tokens].view(group.n_chunks, -1, 1),
                    delta=delta[tokens].view(group.n_chunks, -1, 1),
                    dx=dx_tape[rows],
                    dv=dv_tape[rows],
                )
            for total, tape in ((dqk_sum, dx_tape), (dv_sum, dv_tape)):
                room = self.room("by token", *total.shape)
                total += torch.index_select(tape[own], 0, here.slots, out=room)
        alone = (sums[:-1] > -_ALONE).nonzero().squeeze(-1)
        if alone.numel():
            dv_sum[alone] += upstream[alone] * self._keep_lonely(alone)
        dqk[self.part] = dqk_sum.view(self.batch, self.heads, self.seq, self.dim)
        dv[self.part] = dv_sum.view(self.batch, self.heads, self.seq, self.value)

    def _backward(
        self,
        group: _Group,
        here: _Round,
        *,
        dout: Tensor,
        sums: Tensor,
        delta: Tensor,
        dx: Tensor,
        dv: Tensor,
    ) -> None:
        """Add a group's gradients to those of its rows."""
        weights = self.scores(group, here).sub_(sums).exp2_()
        dweights = torch.bmm(
            dout, self.windows(group.values, group).mT, out=self.room("dweights", *weights.shape)
        )
        window = weights.shape[-1]
        by_key = self.room("windows", group.n_chunks, window, self.value)
        if self.pattern.dropout_p:
            keep = self.keep(group, here, size=weights.shape)
            self._fold(torch.bmm((weights * keep).mT, dout, out=by_key), group, onto=dv)
            dweights.mul_(keep)
        else:
            self._fold(torch.bmm(weights.mT, dout, out=by_key), group, onto=dv)
        dscores = dweights.sub_(delta).mul_(weights)
        dkeys = self.room("dkeys", *group.x.shape).zero_()
        by_key = self.room("windows", group.n_chunks, window, self.dim)
        self._fold(torch.bmm(dscores.mT, self.queries(group.x, group), out=by_key), group, onto=dkeys)
        # Keys are x·n·scale with n = (mean x² + ε)^(−½), whose gradient is −n³·x/dim.
        along = (
            torch.linalg.vecdot(dkeys, group.x).unsqueeze(-1)
            * group.norms.pow(3)
            * (self.pattern.scale / self.dim)
        )
        dx.add_(dkeys.mul_(group.norms * self.pattern.scale)).sub_(group.x * along)
        room = self.room("part", *dscores.shape[:2], self.dim)
        dqueries = torch.bmm(dscores, self.windows(group.keys, group), out=room)
        self.queries(dx, group).add_(dqueries, alpha=1 / _LOG2E)

    def _fold(self, windows: Tensor, group: _Group, *, onto: Tensor) -> None:
        """Add what each window holds of a row to that row."""
        gaps = torch.arange(group.first, group.end) % self.step >= self.row_chunks
        if bool(gaps.any()):
            # What lies between batch rows sees both.
            windows[gaps] = 0
        chunk, count = self.pattern.chunk_length, len(windows)
        for view in range(self.pattern.views):
            rows = onto[view * chunk : (view + count) * chunk].unflatten(0, (count, chunk))
            rows.add_(windows[:, view * chunk : (view + 1) * chunk])


def _extend(x: Tensor, before: int, after: int, *, fill: float | None) -> Tensor:
    """Columns before and after, of a value or of the first column's."""
    if fill is not None:
        return F.pad(x, (before, after), value=fill)
    first = x[:, :1]
    return torch.cat([first.expand(-1, before), x, first.expand(-1, after)], dim=1)


def _merge(attended: Tensor, sums: Tensor, part: Tensor, sum_part: Tensor) -> None:
    """Take what another round found into what was found before: one softmax over both."""
    highest = torch.maximum(sums, sum_part)
    mine, other = (sums - highest).exp2_(), (sum_part - highest).exp2_()
    total = mine + other
    attended.lerp_(part, (other / total).unsqueeze(-1))
    sums.copy_(highest.add_(total.log2_()))
