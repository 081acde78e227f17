"""What attention keeps of the tokens before, so that the next one needs no second look at all of them.

A cache is made from a prompt at once (`prefill`) and then takes one token a row at a time (`step`). The rows
of a batch go on independently, each right behind the last real token of its own prompt.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.attention.masking import MASKED, SELF
from reformer.attention.options import LSHOptions
from reformer.attention.projection import EPSILON, key_scale, unit_keys
from reformer.attention.sorting import sort_by_bucket
from reformer.hashing.family import HashFunction
from reformer.kernels import native


@dataclass(kw_only=True, eq=False)
class LSHCache:
    """The last `band` tokens of every bucket: all that strict LSH attention can still see.

    Every round has a queue of slots for each of its buckets, oldest first and filled up with zeros in front.
    A slot is a row of a store that all rounds share, so that a token's key and value are held once, however
    many queues it stands in; slot 0 is no token. Slots are given out in order of time. Once the store is full
    those that no queue holds any more are cleared out, after as many steps as there can be tokens in sight:
    memory is bounded by rounds × buckets × band, and the time of a step by rounds × band, at any length.

    Args:
        options: of the attention, strict.
        queues: slots of the last tokens of each bucket.
        store: key and value of each slot.
        used: slots given out.
    """

    options: LSHOptions
    queues: Int[Tensor, "rows rounds buckets band"]
    store: Float[Tensor, "rows slots key_and_value"]
    used: int

    @classmethod
    def prefill(
        cls,
        qk: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq value"],
        *,
        buckets: Int[Tensor, "batch heads n_hashes seq"],
        padding_mask: Bool[Tensor, "batch seq"] | None,
        options: LSHOptions,
        n_buckets: int,
        capacity: int,
    ) -> "LSHCache":
        """The cache behind a prompt.

        Args:
            qk: shared queries and keys of the prompt, unnormalised.
            v: values.
            buckets: the ids that the parallel pass used.
            padding_mask: True at real tokens.
            options: of the attention.
            n_buckets: buckets a round.
            capacity: most tokens that prompt and steps come to.

        Raises:
            ValueError: a causality that no cache can follow.
        """
        if not options.strict:
            raise ValueError(
                f"causality={options.causality!r}: which keys a token sees depends on later tokens; "
                "use causality='strict'"
            )
        if padding_mask is not None:
            buckets = buckets.masked_fill(~padding_mask[:, None, None], n_buckets)
        recent = _last_of_each_bucket(buckets, n_buckets=n_buckets, count=options.band)
        key_and_value = torch.cat([unit_keys(qk, logit_scale=options.logit_scale), v], dim=-1)
        cache = cls(
            options=options,
            queues=(recent + 1).int().flatten(0, 1),
            store=F.pad(key_and_value.flatten(0, 1), (0, 0, 1, 0)),
            used=1 + qk.shape[2],
        )
        most_in_sight = options.n_hashes * n_buckets * options.band
        cache._clear_out(slots=1 + min(capacity, 2 * most_in_sight))
        return cache

    def step(
        self,
        qk: Float[Tensor, "batch heads 1 dim"],
        v: Float[Tensor, "batch heads 1 value"],
        *,
        buckets: Int[Tensor, "batch heads n_hashes 1"],
    ) -> Float[Tensor, "batch heads 1 value"]:
        """Attention of one more token in each row, which the ones after it will see.

        Raises:
            ValueError: more tokens than the cache was made for.
        """
        if self.used == self.store.shape[1]:
            self._clear_out(slots=self.used)
            _check_room(self.used - 1, self.store.shape[1] - 1)
        advance = self._step_natively if self._backend(qk) == "native" else self._step
        out = advance(qk, v, buckets)
        self.used += 1
        return out

    @property
    def _own_score(self) -> float:
        """Of the token with itself: the last resort."""
        return SELF + (0.0 if self._counts else math.log(self.options.n_hashes))

    @property
    def _counts(self) -> bool:
        return self.options.duplicates == "count"

    def _backend(self, qk: Float[Tensor, "batch heads 1 dim"]) -> str:
        if qk.dtype != self.store.dtype:
            return "reference"
        return self.options.backend_on(qk.device, dtype=qk.dtype, width=qk.shape[-1])

    def _step_natively(
        self,
        qk: Float[Tensor, "batch heads 1 dim"],
        v: Float[Tensor, "batch heads 1 value"],
        buckets: Int[Tensor, "batch heads n_hashes 1"],
    ) -> Float[Tensor, "batch heads 1 value"]:
        return native.step(
            qk,
            v,
            buckets=buckets,
            queues=self.queues,
            store=self.store,
            used=self.used,
            scale=key_scale(qk.shape[-1], logit_scale=self.options.logit_scale),
            epsilon=EPSILON,
            once=self._counts,
            own_score=self._own_score,
        )

    def _step(
        self,
        qk: Float[Tensor, "batch heads 1 dim"],
        v: Float[Tensor, "batch heads 1 value"],
        buckets: Int[Tensor, "batch heads n_hashes 1"],
    ) -> Float[Tensor, "batch heads 1 value"]:
        key = unit_keys(qk, logit_scale=self.options.logit_scale)
        self.store[:, self.used] = torch.cat([key, v], dim=-1).flatten(0, 2)
        return self._attend(qk.flatten(0, 1), self._push(buckets)).view_as(v)

    def _push(self, buckets: Int[Tensor, "batch heads n_hashes 1"]) -> Int[Tensor, "rows in_sight"]:
        """Put the newest slot into its queues; what they held before, and that slot at the end."""
        rows, rounds, n_buckets, band = self.queues.shape
        first = torch.arange(0, rows * rounds * n_buckets, n_buckets, device=buckets.device)
        queue = first + buckets.flatten()
        before = self.queues.view(-1, band).index_select(0, queue)
        own = before.new_full((rows * rounds, 1), self.used)
        self.queues.view(-1, band).index_copy_(0, queue, torch.cat([before[:, 1:], own], dim=1))
        return torch.cat([before.view(rows, rounds * band), own.view(rows, rounds)[:, :1]], dim=1)

    def _attend(
        self, query: Float[Tensor, "rows 1 dim"], slots: Int[Tensor, "rows in_sight"]
    ) -> Float[Tensor, "rows 1 value"]:
        """One softmax over the slots, of which the last is the token itself."""
        if self._counts and self.options.n_hashes > 1:
            # Of each slot one copy is left, and of slot 0 none.
            slots = slots.sort(dim=1).values
            hidden = slots.diff(dim=1, prepend=slots.new_zeros(len(slots), 1)) == 0
        else:
            hidden = slots == 0
        rows, length, width = self.store.shape
        index = slots + torch.arange(0, rows * length, length, device=slots.device)[:, None]
        seen = self.store.view(-1, width).index_select(0, index.flatten()).view(*slots.shape, width)
        dim = query.shape[-1]
        scores = _wide(query @ seen[..., :dim].transpose(1, 2)).masked_fill_(hidden[:, None], MASKED)
        scores[..., -1] = self._own_score
        return scores.softmax(dim=-1).to(seen.dtype) @ seen[..., dim:]

    def _clear_out(self, *, slots: int) -> None:
        """Keep what the queues hold, in a store of so many slots, numbered anew in the same order."""
        held = self.queues.flatten(1).long()
        live = torch.zeros(self.store.shape[:2], dtype=torch.bool, device=held.device)
        live.scatter_(1, held, True)[:, 0] = True
        self.queues = (live.cumsum(dim=1) - 1).gather(1, held).int().view_as(self.queues)
        live, kept = live.sort(dim=1, descending=True, stable=True)
        self.used = int(live.any(dim=0).sum())
        kept_rows = self.store.take_along_dim(kept[:, : self.used, None], dim=1)
        if self.store.shape[1] != slots:
            self.store = self.store.new_zeros(len(held), slots, self.store.shape[2])
        self.store[:, : self.used] = kept_rows


@dataclass(kw_only=True, eq=False)
class LocalCache:
    """A ring of the last tokens: as many as a query of local attention can see from the end of its chunk.

    Args:
        chunk_length: tokens a chunk.
        n_chunks_before: earlier chunks that a query sees besides its own.
        keys: of the tokens in the ring.
        values: likewise.
        positions: where they stand in their row; −1 at padding.
        ends: position of each row's next token.
        oldest: the place of the ring that is written next.
    """

    chunk_length: int
    n_chunks_before: int
    keys: Float[Tensor, "batch heads places dim"]
    values: Float[Tensor, "batch heads places value"]
    positions: Int[Tensor, "batch places"]
    ends: Int[Tensor, " batch"]
    oldest: int = 0

    @classmethod
    def prefill(
        cls,
        k: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq value"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None,
        chunk_length: int,
        n_chunks_before: int,
    ) -> "LocalCache":
        """The cache behind a prompt.

        Args:
            k: keys of the prompt.
            v: values.
            padding_mask: True at real tokens.
            chunk_length: tokens a chunk.
            n_chunks_before: earlier chunks that a query sees besides its own.
        """
        real = _real(k, padding_mask=padding_mask)
        ends = row_ends(real)
        places = (n_chunks_before + 1) * chunk_length
        positions = ends[:, None] - places + torch.arange(places, device=k.device)
        nearest = positions.clamp(min=0)
        there = (positions >= 0) & real.gather(1, nearest)
        return cls(
            chunk_length=chunk_length,
            n_chunks_before=n_chunks_before,
            keys=k.take_along_dim(nearest[:, None, :, None], dim=2),
            values=v.take_along_dim(nearest[:, None, :, None], dim=2),
            positions=positions.masked_fill(~there, -1),
            ends=ends,
        )

    def step(
        self,
        q: Float[Tensor, "batch heads 1 dim"],
        k: Float[Tensor, "batch heads 1 dim"],
        v: Float[Tensor, "batch heads 1 value"],
    ) -> Float[Tensor, "batch heads 1 value"]:
        """Attention of one more token in each row, which the ones after it will see."""
        self.keys[:, :, self.oldest] = k.squeeze(2)
        self.values[:, :, self.oldest] = v.squeeze(2)
        self.positions[:, self.oldest] = self.ends
        first = (self.ends // self.chunk_length - self.n_chunks_before) * self.chunk_length
        hidden = self.positions < first.clamp(min=0)[:, None]
        self.oldest = (self.oldest + 1) % self.positions.shape[1]
        self.ends = self.ends + 1
        scores = _wide(q @ self.keys.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill_(hidden[:, None, None], MASKED).softmax(dim=-1)
        return weights.to(v.dtype) @ self.values


@dataclass(kw_only=True, eq=False)
class FullCache:
    """Every key and value so far: what full attention needs, and what grows with the length.

    Args:
        keys: of the tokens so far; behind them, room.
        values: likewise.
        bias: what is added to the logits of each key: 0 or −∞; None adds nothing.
        own_bias: what is added to the logit of a token's own key.
        scale: what logits are multiplied by.
        n_keys: keys of largest logit that a query sees besides its own; None is all.
        used: tokens so far, padding included.
    """

    keys: Float[Tensor, "batch heads capacity dim"]
    values: Float[Tensor, "batch heads capacity value"]
    bias: Float[Tensor, "batch 1 1 capacity"] | None
    own_bias: float
    scale: float
    n_keys: int | None
    used: int

    @classmethod
    def prefill(
        cls,
        k: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq value"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None,
        capacity: int,
        shared_query_key: bool,
        n_keys: int | None = None,
    ) -> "FullCache":
        """The cache behind a prompt.

        Args:
            k: keys of the prompt; of `full_attention`, the unit keys.
            v: values.
            padding_mask: True at real tokens.
            capacity: most tokens that prompt and steps come to.
            shared_query_key: as in `full_attention`: keys are scaled already, and a token's own comes last.
            n_keys: of `oracle_attention`, whose queries and keys are shared; None for the other kinds.
        """
        seq, room = k.shape[2], capacity - k.shape[2]
        bias = None
        if shared_query_key or padding_mask is not None:
            hidden = F.pad(~_real(k, padding_mask=padding_mask), (0, room))
            bias = torch.zeros_like(hidden, dtype=k.dtype).masked_fill(hidden, -torch.inf)[:, None, None]
        return cls(
            keys=F.pad(k, (0, 0, 0, room)),
            values=F.pad(v, (0, 0, 0, room)),
            bias=bias,
            own_bias=max(SELF, torch.finfo(k.dtype).min) if shared_query_key else 0.0,
            scale=1.0 if shared_query_key else 1 / math.sqrt(k.shape[3]),
            n_keys=n_keys,
            used=seq,
        )

    def step(
        self,
        q: Float[Tensor, "batch heads 1 dim"],
        k: Float[Tensor, "batch heads 1 dim"],
        v: Float[Tensor, "batch heads 1 value"],
    ) -> Float[Tensor, "batch heads 1 value"]:
        """Attention of one more token in each row, which the ones after it will see.

        Raises:
            ValueError: more tokens than the cache was made for.
        """
        _check_room(self.used, self.keys.shape[2])
        self.keys[:, :, self.used] = k.squeeze(2)
        self.values[:, :, self.used] = v.squeeze(2)
        self.used += 1
        keys, values = self.keys[:, :, : self.used], self.values[:, :, : self.used]
        return F.scaled_dot_product_attention(
            q, keys, values, attn_mask=self._step_bias(q, keys), scale=self.scale
        )

    def _step_bias(
        self, q: Float[Tensor, "batch heads 1 dim"], keys: Float[Tensor, "batch heads used dim"]
    ) -> Float[Tensor, "batch #heads 1 used"] | None:
        """What is added to the logits of the newest token, whose own key is the last."""
        if self.bias is None:
            return None
        others = self.bias[..., : self.used - 1]
        if self.n_keys is not None:
            logits = _wide(q) @ _wide(keys[:, :, :-1]).transpose(-1, -2) + others
            nearest = logits.topk(min(self.n_keys, self.used - 1), dim=-1).values
            last = nearest[..., -1:] if nearest.shape[-1] else torch.inf
            others = others.masked_fill(logits < last, -torch.inf)
        return F.pad(others, (0, 1), value=self.own_bias)


@dataclass(kw_only=True, eq=False)
class Caches:
    """What all layers keep in one decode: made by the prompt's pass, used by those of single tokens.

    Args:
        capacity: most tokens that a row comes to.
        of_layer: the cache of each layer that has one.
        hash_functions: of each layer that hashes: the prompt's draw.
        of_source: keys and values of the source, for each layer that looks at one.
    """

    capacity: int
    of_layer: dict[int, LSHCache | LocalCache | FullCache] = field(default_factory=dict)
    hash_functions: dict[int, HashFunction] = field(default_factory=dict)
    of_source: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in the caches."""
        of_layers = (x for cache in self.of_layer.values() for x in vars(cache).values())
        of_source = (x for pair in self.of_source.values() for x in pair)
        return sum(x.nbytes for x in (*of_layers, *of_source) if isinstance(x, Tensor))


def row_ends(padding_mask: Bool[Tensor, "batch seq"]) -> Int[Tensor, " batch"]:
    """Position right behind the last real token of each row; 0 where there is none."""
    positions = torch.arange(1, padding_mask.shape[1] + 1, device=padding_mask.device)
    return (padding_mask * positions).amax(dim=1)


def _last_of_each_bucket(
    buckets: Int[Tensor, "batch heads rounds seq"], *, n_buckets: int, count: int
) -> Int[Tensor, "batch heads rounds n_buckets count"]:
    """Positions of the last tokens of every bucket, oldest first; −1 in front where there are fewer.

    Ids may go up to and with `n_buckets`, whose tokens are left out.
    """
    sizes = torch.zeros(*buckets.shape[:3], n_buckets + 1, dtype=torch.int64, device=buckets.device)
    sizes.scatter_add_(-1, buckets.long(), torch.ones_like(buckets, dtype=torch.int64))
    ends = sizes.cumsum(dim=-1)[..., :n_buckets, None]
    slots = ends - count + torch.arange(count, device=buckets.device)
    there = slots >= ends - sizes[..., :n_buckets, None]
    # One place in front of the order, for what is not there.
    order = F.pad(sort_by_bucket(buckets).positions, (1, 0), value=-1)
    places = (slots + 1).masked_fill(~there, 0)
    return order.gather(-1, places.flatten(3)).view_as(places)


def _real(
    x: Float[Tensor, "batch heads seq dim"], *, padding_mask: Bool[Tensor, "batch seq"] | None
) -> Bool[Tensor, "batch seq"]:
    if padding_mask is not None:
        return padding_mask
    return torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)


def _wide(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """In a type in which the order of penalties holds."""
    return x if x.dtype == torch.float64 else x.float()


def _check_room(used: int, capacity: int) -> None:
    if used >= capacity:
        raise ValueError(f"capacity={capacity}: the cache is full; make it for {used + 1} tokens or more")
