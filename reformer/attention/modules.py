"""Attention layers: projections around the attention functions."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reformer.attention.full import full_attention, full_standard_attention
from reformer.attention.local import local_attention
from reformer.attention.lsh import attend
from reformer.attention.options import hash_vectors, one_of
from reformer.config import ReformerConfig
from reformer.hashing.family import HashFamily
from reformer.hashing.random import Random
from reformer.randomness import generator

#: What a shared query-key layer can do with the same weights.
SHARED_KINDS = ("lsh", "full", "random", "knock_out")


@dataclass(frozen=True, kw_only=True)
class Attending:
    """How shared query-key layers attend, where it differs from the config; None leaves a setting as it is.

    Args:
        kind: `lsh`, `full`, or a control: `random` buckets, or `knock_out` (the layer gives 0).
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
    """

    draw: int = 0
    attending: Attending = Attending()
    padding_mask: Bool[Tensor, "batch seq"] | None = None


class Attended(NamedTuple):
    """The output of an attention layer, and the buckets it used, for a recompute that must not re-hash."""

    out: Float[Tensor, "batch seq d_model"]
    buckets: Int[Tensor, "batch heads n_hashes seq"] | None


class SharedQueryKeyAttention(nn.Module):
    """LSH or full attention whose queries and keys are one projection."""

    def __init__(self, config: ReformerConfig, *, layer: int) -> None:
        super().__init__()
        width = config.n_heads * config.head_width
        self.config = config
        self.layer = layer
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
        kind = call.attending.kind or self.config.kind(self.layer)
        if kind == "knock_out":
            return Attended(torch.zeros_like(x), None)
        qk = split_heads(self.query_key(x), heads=self.config.n_heads)
        v = split_heads(self.value(x), heads=self.config.n_heads)
        dropout_p = self.config.attention_dropout if self.training else 0.0
        if kind == "full":
            out = full_attention(
                qk,
                v,
                logit_scale=self.config.logit_scale,
                padding_mask=call.padding_mask,
                dropout_p=dropout_p,
            )
        else:
            options = self.config.lsh_options(n_hashes=call.attending.n_hashes, dropout_p=dropout_p)
            if buckets is None:
                buckets = self._hash(qk, kind=kind, call=call).int()
            out = attend(qk, v, buckets=buckets, padding_mask=call.padding_mask, options=options)
        return Attended(self.output(merge_heads(out)), buckets)

    def _hash(
        self, qk: Float[Tensor, "batch heads seq dim"], *, kind: str, call: AttentionCall
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        attending, config = call.attending, self.config
        hashing = Random() if kind == "random" else (attending.hashing or config.hashing)
        seed = attending.hash_seed if attending.hash_seed is not None else config.hash_seed
        return hash_vectors(
            qk,
            hashing=hashing,
            n_hashes=attending.n_hashes or config.n_hashes,
            n_buckets=config.bucket_count,
            generator=generator(seed, self.layer, call.draw),
        )


class StandardAttention(nn.Module):
    """Local or standard full attention, with queries, keys and values of their own."""

    def __init__(self, config: ReformerConfig, *, layer: int) -> None:
        super().__init__()
        width = config.n_heads * config.head_width
        self.config = config
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
        q, k, v = (
            split_heads(project(x), heads=self.config.n_heads)
            for project in (self.query, self.key, self.value)
        )
        dropout_p = self.config.attention_dropout if self.training else 0.0
        if self.kind == "full_standard":
            out = full_standard_attention(q, k, v, padding_mask=call.padding_mask, dropout_p=dropout_p)
        else:
            out = local_attention(
                q,
                k,
                v,
                chunk_length=self.config.local_chunk_length or self.config.chunk_length,
                n_chunks_before=self.config.local_n_chunks_before,
                padding_mask=call.padding_mask,
                dropout_p=dropout_p,
            )
        return Attended(self.output(merge_heads(out)), None)


def build_attention(config: ReformerConfig, *, layer: int) -> SharedQueryKeyAttention | StandardAttention:
    """The attention of a layer, by the config's pattern."""
    shared = config.kind(layer) in SHARED_KINDS
    return SharedQueryKeyAttention(config, layer=layer) if shared else StandardAttention(config, layer=layer)


def split_heads(x: Float[Tensor, "batch seq width"], *, heads: int) -> Float[Tensor, "batch heads seq dim"]:
    """Cut the width into heads."""
    parts: Tensor = x.unflatten(-1, (heads, -1))
    return parts.transpose(1, 2)


def merge_heads(x: Float[Tensor, "batch heads seq dim"]) -> Float[Tensor, "batch seq width"]:
    """Undo `split_heads`."""
    return x.transpose(1, 2).flatten(2)
