"""Attention layers: projections around the attention functions."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reformer.attention.cross import cross_attention
from reformer.attention.decode_cache import Caches, FullCache, LocalCache, LSHCache
from reformer.attention.full import full_attention, full_standard_attention
from reformer.attention.local import local_attention
from reformer.attention.lsh import attend
from reformer.attention.options import LSHOptions, hash_function, hash_vectors, one_of
from reformer.attention.oracle import oracle_attention
from reformer.attention.projection import unit_keys
from reformer.attention.rotary import rotate
from reformer.compilation import uncompiled
from reformer.config import ReformerConfig
from reformer.hashing import buckets as bucket_counts
from reformer.hashing.family import HashFamily
from reformer.hashing.random import Random
from reformer.randomness import dropout, generator

#: What a shared query-key layer can do with the same weights.
SHARED_KINDS = ("lsh", "full", "oracle", "random", "knock_out")
#: Key of the random stream of hash dropout, so that it moves no rotation.
_HASH_DROPOUT = 1


@dataclass(frozen=True, kw_only=True)
class Attending:
    """How shared query-key layers attend, where it differs from the config; None leaves a setting as it is.

    Args:
        kind: `lsh`, `full`, or a control: the `oracle`, `random` buckets, or `knock_out` (the layer gives 0).
        n_hashes: hash rounds.
        hashing: hash family.
        hash_seed: where rotations are drawn from.
    """

    kind: str | None = None
    n_hashes: int | None = None
    hashing: HashFamily | None = None
    hash_seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind is not None:
            one_of("kind", self.kind, SHARED_KINDS)


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """What one forward pass tells every attention layer.

    Args:
        draw: number of the hash draw; the same number draws the same rotations.
        attending: settings that differ from the config.
        padding_mask: True at real tokens.
        positions: where the tokens stand in their rows; None counts from 0.
        caches: of a decode. Empty, they are filled from the tokens of this pass; filled, the pass is of one
            token a row, which sees through them what came before.
        source: the sequence that cross-attention looks at, if there is one.
        source_padding_mask: True at its real tokens.
    """

    draw: int = 0
    attending: Attending = Attending()
    padding_mask: Bool[Tensor, "batch seq"] | None = None
    positions: Int[Tensor, "batch seq"] | None = None
    caches: Caches | None = None
    source: Float[Tensor, "batch source width"] | None = None
    source_padding_mask: Bool[Tensor, "batch source"] | None = None


class Attended(NamedTuple):
    """The output of an attention layer, and the buckets it used, for a recompute that must not re-hash."""

    out: Float[Tensor, "batch seq d_model"]
    buckets: Int[Tensor, "batch heads n_hashes seq"] | None


class SharedQueryKeyAttention(nn.Module):
    """Attention whose queries and keys are one projection: LSH, full, or a control of them.

    Rotary positions turn that projection before it is hashed, so that hashing looks for large logits as they
    are; the length of a query, and so its key's, does not change.
    """

    def __init__(self, config: ReformerConfig, *, layer: int) -> None:
        super().__init__()
        width = config.n_heads * config.head_width
        self.config = config
        self.layer = layer
        self.kind = config.kind(layer)
        self.query_key = nn.Linear(config.d_model, width, bias=False)
        self.value = nn.Linear(config.d_model, width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    ) -> Attended:
        """Attend; given `buckets` are used instead of hashing again."""
        kind = call.attending.kind or self.kind
        if kind == "knock_out":
            return Attended(torch.zeros_like(x), None)
        qk, v = self.project(x, positions=call.positions)
        if call.caches is not None and self.layer in call.caches.of_layer:
            out, buckets = self._step(qk, v, call=call, caches=call.caches, buckets=buckets)
        else:
            out, buckets = self.attend(qk, v, call=call, buckets=buckets)
        return Attended(self.output(merge_heads(out)), buckets)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """What makes that which `turn` and then `attend` are given, values last."""
        return self.query_key, self.value

    def attend(
        self,
        qk: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq dim"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
    ) -> tuple[Float[Tensor, "batch heads seq dim"], Int[Tensor, "batch heads n_hashes seq"] | None]:
        """Attention among the tokens of this pass, of all heads or some, and the buckets it used."""
        kind = call.attending.kind or self.kind
        dropout_p = self.config.attention_dropout if self.training else 0.0
        options = self.config.lsh_options(n_hashes=call.attending.n_hashes, dropout_p=dropout_p)
        if self._fits_one_chunk(qk.shape[2]):
            kind = "full"
        if kind in ("full", "oracle"):
            out = _attend_densely(qk, v, kind=kind, padding_mask=call.padding_mask, options=options)
        else:
            if buckets is None:
                # Not compiled: every draw seeds a generator of its own.
                buckets = uncompiled(self.hash_into_buckets)(qk, call=call).int()
            out = attend(qk, v, buckets=buckets, padding_mask=call.padding_mask, options=options)
        if call.caches is not None:
            self._fill(call.caches, qk, v, buckets=buckets, kind=kind, call=call, options=options)
        return out, buckets

    def project(
        self, x: Float[Tensor, "batch seq d_model"], *, positions: Int[Tensor, "batch seq"] | None = None
    ) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq dim"]]:
        """Shared queries and keys, and values, of tokens at these positions; None counts from 0."""
        qk, v = (split_heads(project(x), heads=self.config.n_heads) for project in self.projections)
        return self.turn(qk, positions=positions), v

    def turn(
        self, qk: Float[Tensor, "batch heads seq dim"], *, positions: Int[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch heads seq dim"]:
        """By rotary positions, if the model has them."""
        return rotate(qk, positions=positions) if self.config.positions == "rotary" else qk

    def hashes(self, x: Float[Tensor, "batch seq d_model"], *, call: AttentionCall) -> bool:
        """Whether these tokens are hashed in that pass."""
        return self.hash_family(call.attending) is not None and not self._fits_one_chunk(x.shape[1])

    def _fits_one_chunk(self, seq: int) -> bool:
        """Whether transformers would not hash so few tokens."""
        return self.config.conventions == "transformers" and seq <= self.config.chunk_length

    def hash_family(self, attending: Attending) -> HashFamily | None:
        """The family that the layer hashes by under these settings; None if it does not hash."""
        kind = attending.kind or self.kind
        if kind not in ("lsh", "random"):
            return None
        return Random() if kind == "random" else (attending.hashing or self.config.hashing)

    def hash_into_buckets(
        self, qk: Float[Tensor, "batch heads seq dim"], *, call: AttentionCall
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        """The ids of projected tokens in that pass, if it attends by hashing."""
        if self.training and self.config.hash_dropout > 0:
            # Not from the global stream, which a recompute on the same buckets could not follow.
            own = generator(self._hash_seed(call), self.layer, call.draw, _HASH_DROPOUT, device=qk.device)
            qk = dropout(qk.detach(), self.config.hash_dropout, generator=own)
        return hash_vectors(qk, padding_mask=call.padding_mask, **self._hash_draw(call))

    def _hash_draw(self, call: AttentionCall) -> dict[str, Any]:
        """How the layer hashes in this pass, as keywords."""
        return {
            "hashing": self.hash_family(call.attending),
            "n_hashes": call.attending.n_hashes or self.config.n_hashes,
            "n_buckets": self.config.bucket_count,
            "generator": self._generator(call),
        }

    def _generator(self, call: AttentionCall) -> torch.Generator:
        if self.config.conventions == "transformers":
            return torch.Generator().manual_seed(self._hash_seed(call))
        return generator(self._hash_seed(call), self.layer, call.draw)

    def _hash_seed(self, call: AttentionCall) -> int:
        seed = call.attending.hash_seed
        return seed if seed is not None else self.config.hash_seed

    def _fill(
        self,
        caches: Caches,
        qk: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq dim"],
        *,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
        kind: str,
        call: AttentionCall,
        options: LSHOptions,
    ) -> None:
        """Keep of a prompt what later tokens will see."""
        if buckets is None:
            caches.of_layer[self.layer] = FullCache.prefill(
                unit_keys(qk, logit_scale=options.logit_scale),
                v,
                padding_mask=call.padding_mask,
                capacity=caches.capacity,
                shared_query_key=True,
                n_keys=options.n_keys if kind == "oracle" else None,
            )
            return
        caches.hash_functions[self.layer] = hash_function(qk, **self._hash_draw(call))
        caches.of_layer[self.layer] = LSHCache.prefill(
            qk,
            v,
            buckets=buckets,
            padding_mask=call.padding_mask,
            options=options,
            n_buckets=bucket_counts.total(self.config.bucket_count),
            capacity=caches.capacity,
        )

    def _step(
        self,
        qk: Float[Tensor, "batch heads 1 dim"],
        v: Float[Tensor, "batch heads 1 dim"],
        *,
        call: AttentionCall,
        caches: Caches,
        buckets: Int[Tensor, "batch heads n_hashes 1"] | None,
    ) -> tuple[Float[Tensor, "batch heads 1 dim"], Int[Tensor, "batch heads n_hashes 1"] | None]:
        """Attention of one token a row to what came before, and the buckets it used."""
        cache = caches.of_layer[self.layer]
        if isinstance(cache, FullCache):
            return cache.step(qk, unit_keys(qk, logit_scale=self.config.logit_scale), v), None
        assert isinstance(cache, LSHCache)
        assert call.positions is not None
        if buckets is None:
            buckets = caches.hash_functions[self.layer](qk, call.positions)
        return cache.step(qk, v, buckets=buckets), buckets


class StandardAttention(nn.Module):
    """Local or standard full attention, with queries, keys and values of their own."""

    def __init__(self, config: ReformerConfig, *, layer: int) -> None:
        super().__init__()
        width = config.n_heads * config.head_width
        self.config = config
        self.layer = layer
        self.kind = config.kind(layer)
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key = nn.Linear(config.d_model, width, bias=False)
        self.value = nn.Linear(config.d_model, width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    ) -> Attended:
        """Attend; nothing is hashed."""
        q, k, v = self.project(x, positions=call.positions)
        if call.caches is not None and self.layer in call.caches.of_layer:
            out = self._step(q, k, v, caches=call.caches)
        else:
            out, _ = self.attend(q, k, v, call=call)
        return Attended(self.output(merge_heads(out)), None)

    @property
    def projections(self) -> tuple[nn.Linear, ...]:
        """What makes that which `turn` and then `attend` are given, values last."""
        return self.query, self.key, self.value

    def attend(
        self,
        q: Float[Tensor, "batch heads seq dim"],
        k: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq dim"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    ) -> tuple[Float[Tensor, "batch heads seq dim"], None]:
        """Attention among the tokens of this pass, of all heads or some."""
        local = self.kind == "local"
        share = self.config.local_dropout if local else self.config.attention_dropout
        dropout_p = share if self.training else 0.0
        if not local:
            out = full_standard_attention(
                q, k, v, causal=self.config.causal, padding_mask=call.padding_mask, dropout_p=dropout_p
            )
        else:
            out = local_attention(
                q,
                k,
                v,
                chunk_length=self._chunk_length,
                n_chunks_before=self.config.local_n_chunks_before,
                n_chunks_after=self.config.local_n_chunks_after,
                causal=self.config.causal,
                padding_mask=call.padding_mask,
                dropout_p=dropout_p,
                wraps=self.config.conventions == "transformers",
            )
        if call.caches is not None:
            self._fill(call.caches, k, v, padding_mask=call.padding_mask)
        return out, None

    def _fill(
        self,
        caches: Caches,
        k: Float[Tensor, "batch heads seq dim"],
        v: Float[Tensor, "batch heads seq dim"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None,
    ) -> None:
        """Keep of a prompt what later tokens will see."""
        if self.kind == "full_standard":
            caches.of_layer[self.layer] = FullCache.prefill(
                k, v, padding_mask=padding_mask, capacity=caches.capacity, shared_query_key=False
            )
            return
        caches.of_layer[self.layer] = LocalCache.prefill(
            k,
            v,
            padding_mask=padding_mask,
            chunk_length=self._chunk_length,
            n_chunks_before=self.config.local_n_chunks_before,
        )

    def _step(
        self,
        q: Float[Tensor, "batch heads 1 dim"],
        k: Float[Tensor, "batch heads 1 dim"],
        v: Float[Tensor, "batch heads 1 dim"],
        *,
        caches: Caches,
    ) -> Float[Tensor, "batch heads 1 dim"]:
        """Attention of one token a row to what came before."""
        cache = caches.of_layer[self.layer]
        assert isinstance(cache, FullCache | LocalCache)
        return cache.step(q, k, v)

    @property
    def _chunk_length(self) -> int:
        return self.config.local_chunk_length or self.config.chunk_length

    def project(
        self, x: Float[Tensor, "batch seq d_model"], *, positions: Int[Tensor, "batch seq"] | None = None
    ) -> tuple[
        Float[Tensor, "batch heads seq dim"],
        Float[Tensor, "batch heads seq dim"],
        Float[Tensor, "batch heads seq dim"],
    ]:
        """Queries, keys and values of tokens at these positions; None counts from 0."""
        q, k, v = (split_heads(project(x), heads=self.config.n_heads) for project in self.projections)
        return self.turn(q, positions=positions), self.turn(k, positions=positions), v

    def turn(
        self, x: Float[Tensor, "batch heads seq dim"], *, positions: Int[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch heads seq dim"]:
        """By rotary positions, if the model has them."""
        return rotate(x, positions=positions) if self.config.positions == "rotary" else x


class CrossAttention(nn.Module):
    """Queries from the tokens, keys and values from the source; positions of the two are not compared."""

    def __init__(self, config: ReformerConfig, *, layer: int, source_width: int) -> None:
        super().__init__()
        width = config.n_heads * config.head_width
        self.config = config
        self.layer = layer
        self.query = nn.Linear(config.d_model, width, bias=False)
        self.key = nn.Linear(source_width, width, bias=False)
        self.value = nn.Linear(source_width, width, bias=False)
        self.output = nn.Linear(width, config.d_model, bias=False)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], *, call: AttentionCall
    ) -> Float[Tensor, "batch seq d_model"]:
        """Attend to the source of the call.

        Raises:
            ValueError: a call without a source.
        """
        key, value = self._source(call)
        attended = cross_attention(
            split_heads(self.query(x), heads=self.config.n_heads),
            key,
            value,
            padding_mask=call.source_padding_mask,
            dropout_p=self.config.attention_dropout if self.training else 0.0,
        )
        out: Tensor = self.output(merge_heads(attended))
        return out

    def _source(
        self, call: AttentionCall
    ) -> tuple[Float[Tensor, "batch heads source dim"], Float[Tensor, "batch heads source dim"]]:
        """Keys and values of the source, which a decode makes once."""
        if call.caches is not None and self.layer in call.caches.of_source:
            return call.caches.of_source[self.layer]
        if call.source is None:
            raise ValueError("source=None: cross-attention looks at a second sequence; give source")
        key, value = (
            split_heads(project(call.source), heads=self.config.n_heads) for project in (self.key, self.value)
        )
        if call.caches is not None:
            call.caches.of_source[self.layer] = key, value
        return key, value


def build_attention(config: ReformerConfig, *, layer: int) -> SharedQueryKeyAttention | StandardAttention:
    """The attention of a layer, by the config's pattern."""
    shared = config.kind(layer) in SHARED_KINDS
    return SharedQueryKeyAttention(config, layer=layer) if shared else StandardAttention(config, layer=layer)


def _attend_densely(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq dim"],
    *,
    kind: str,
    padding_mask: Bool[Tensor, "batch seq"] | None,
    options: LSHOptions,
) -> Float[Tensor, "batch heads seq dim"]:
    """What LSH attention approximates, `full`, or its ceiling, the `oracle`."""
    attention = full_attention if kind == "full" else partial(oracle_attention, n_keys=options.n_keys)
    return attention(
        qk,
        v,
        causal=options.causal,
        logit_scale=options.logit_scale,
        padding_mask=padding_mask,
        dropout_p=options.dropout_p,
    )


def split_heads(x: Float[Tensor, "batch seq width"], *, heads: int) -> Float[Tensor, "batch heads seq dim"]:
    """Cut the width into heads."""
    parts: Tensor = x.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2)


def merge_heads(x: Float[Tensor, "batch heads seq dim"]) -> Float[Tensor, "batch seq width"]:
    """Undo `split_heads`."""
    return x.transpose(1, 2).flatten(2)
