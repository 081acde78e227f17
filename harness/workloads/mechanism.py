"""Why a setting is as good as it is: what hashing finds of full attention, and what reversing costs.

Everything here looks at every pair of tokens of a few sequences, and runs after what is timed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from harness.record import Sample
from reformer import ReformerLM, full_attention
from reformer.attention.lsh import attend
from reformer.attention.modules import Attending, AttentionCall, SharedQueryKeyAttention
from reformer.attention.options import LSHOptions
from reformer.attention.reference import times_shown
from reformer.hashing import Buckets, buckets

#: Tokens of a sequence that are looked at: all pairs of them, for every pair of rounds.
LONGEST = 512
#: Outputs that differ by more than this, beside the largest, have moved.
_MOVED = 1e-4


class Recall(NamedTuple):
    """Where the weights of full attention go under LSH attention: shares of them, means over the queries.

    Args:
        shown: on keys that are shown.
        hash_miss: on keys that share no bucket with the query in any round.
        overflow: on keys that share one, but lie farther away in it than any query sees.
        cut: on keys that are near enough, but outside the window of this query's chunk.
        seam_gain: the part of `shown` that is there only because windows reach into another round.
    """

    shown: float
    hash_miss: float
    overflow: float
    cut: float
    seam_gain: float


class Balance(NamedTuple):
    """How evenly tokens fill the buckets of a round: means over rounds.

    Args:
        max_over_mean: largest bucket over the mean one.
        entropy_bits: of the sizes.
    """

    max_over_mean: float
    entropy_bits: float


#: Quantities of a layer under one draw of hashes, and their units.
UNITS: Mapping[str, str] = {
    "recall": "fraction",
    "recall_lost_to_hash_miss": "fraction",
    "recall_lost_to_overflow": "fraction",
    "recall_lost_to_cut": "fraction",
    "recall_gained_at_seams": "fraction",
    "output_error": "ratio",
    "bucket_max_over_mean": "ratio",
    "bucket_entropy_bits": "bits",
}


def hashing_samples(
    model: ReformerLM, tokens: Int[Tensor, "batch seq"], *, hash_seeds: Sequence[int]
) -> tuple[Sample, ...]:
    """`UNITS` of a model on some sequences, means over layers, one value a hash seed; nothing if none hashes.

    The layers need not have been trained by hashing: any that shares queries and keys can be hashed.
    """
    vectors = projections(model, tokens)
    if not vectors:
        return ()
    by_seed = [_of_layers(model, vectors, hash_seed=seed) for seed in hash_seeds]
    return tuple(
        Sample(metric=metric, unit=unit, values=tuple(found[metric] for found in by_seed))
        for metric, unit in UNITS.items()
    )


def model_samples(
    model: ReformerLM, tokens: Int[Tensor, "batch seq"], targets: Int[Tensor, "batch seq"]
) -> Iterator[Sample]:
    """What moves that should not, and what reversing the layers costs in precision.

    - `causality_leak`: share of earlier outputs that move when the last quarter of the tokens is another one.
    - `reconstruction_error`: largest difference of a layer's inputs to what backward recomputes them as.
    - `gradient_cosine`: of the gradient so computed with that of activations which were all kept.
    """
    leak = causality_leak(model, tokens)
    yield Sample(metric="causality_leak", unit="fraction", values=(leak,))
    if _reverses(model):
        error = float(model.reconstruction_errors(tokens).amax())
        yield Sample(metric="reconstruction_error", unit="ratio", values=(error,))
        cosine = float(model.gradient_cosine(tokens, targets))
        yield Sample(metric="gradient_cosine", unit="ratio", values=(cosine,))


def layer_series(model: ReformerLM, tokens: Int[Tensor, "batch seq"]) -> dict[str, dict[str, list[float]]]:
    """`reconstruction`: the error of each layer's inputs; empty if nothing is reversed."""
    if not _reverses(model):
        return {}
    errors = model.reconstruction_errors(tokens).tolist()
    return {"reconstruction": {"layer": [float(layer) for layer in range(len(errors))], "error": errors}}


def _reverses(model: ReformerLM) -> bool:
    return model.config.residual.startswith("reversible")


@torch.no_grad()
def causality_leak(model: ReformerLM, tokens: Int[Tensor, "batch seq"]) -> float:
    """Share of the outputs before the last quarter that another last quarter moves."""
    first = tokens.shape[1] - max(1, tokens.shape[1] // 4)
    other = tokens.clone()
    # Each token becomes another one of the vocabulary.
    other[:, first:] = (tokens[:, first:] + 1) % model.config.vocab_size
    one, two = (model(x)[:, :first].float() for x in (tokens, other))
    moved = (one - two).abs().amax(dim=-1) > _MOVED * one.abs().amax()
    return float(moved.float().mean()) if moved.numel() else 0.0


@torch.no_grad()
def projections(
    model: ReformerLM, tokens: Int[Tensor, "batch seq"]
) -> dict[int, tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq dim"]]]:
    """Shared queries and keys, and values, of every layer that shares them, by layer."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, SharedQueryKeyAttention)
        seen[layer.layer] = layer.project(*inputs)

    handles = [layer.register_forward_pre_hook(keep) for layer in _shared_layers(model)]
    training = model.training
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
def _of_layers(
    model: ReformerLM,
    vectors: Mapping[int, tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq dim"]]],
    *,
    hash_seed: int,
) -> dict[str, float]:
    """Every quantity under the buckets that the model itself would use: means over layers."""
    config = model.config
    options = config.lsh_options()
    call = AttentionCall(attending=Attending(kind="lsh", hash_seed=hash_seed))
    means = dict.fromkeys(UNITS, 0.0)
    for layer in _shared_layers(model):
        qk, v = vectors[layer.layer]
        ids = layer.hash_into_buckets(qk, call=call)
        values = (
            *recall(qk, ids, options=options),
            output_error(qk, v, ids, options=options),
            *balance(ids, n_buckets=config.bucket_count),
        )
        for metric, value in zip(UNITS, values, strict=True):
            means[metric] += value / len(vectors)
    return means


def _shared_layers(model: ReformerLM) -> list[SharedQueryKeyAttention]:
    return [module for module in model.modules() if isinstance(module, SharedQueryKeyAttention)]


def recall(
    qk: Float[Tensor, "batch heads seq dim"],
    ids: Int[Tensor, "batch heads n_hashes seq"],
    *,
    options: LSHOptions,
) -> Recall:
    """What LSH attention shows of full attention's weights, and why it does not show the rest.

    The first query is left out: it has no key but its own, which is always shown. That key, which full
    attention uses last, counts like any other. The four shares add up to 1.
    """
    seq = qk.shape[2]
    own = torch.eye(seq, dtype=qk.dtype, device=qk.device).expand(1, qk.shape[1], seq, seq)
    real = torch.ones(1, seq, dtype=torch.bool, device=qk.device)
    rows = []
    # One sequence at a time, as all pairs of it are looked at.
    for row in range(len(qk)):
        one = slice(row, row + 1)
        # Values that are one-hot vectors make an attention's output its weights.
        weights = full_attention(qk[one], own, causal=options.causal, logit_scale=options.logit_scale)
        shown = times_shown(ids[one], padding_mask=real, options=options) > 0
        together, near = _same_bucket(ids[one], options=options)
        beyond_seams = torch.zeros_like(shown)
        if options.seams != "masked":
            inside = times_shown(ids[one], padding_mask=real, options=replace(options, seams="masked"))
            beyond_seams = shown & (inside == 0)
        parts = (
            shown,
            ~shown & ~together,
            ~shown & together & ~near,
            ~shown & near,
            beyond_seams,
        )
        rows.append([float((weights * part).sum(dim=-1)[..., 1:].mean()) for part in parts])
    return Recall(*(math.fsum(column) / len(rows) for column in zip(*rows, strict=True)))


def _same_bucket(
    ids: Int[Tensor, "batch heads n_hashes seq"], *, options: LSHOptions
) -> tuple[Tensor, Tensor]:
    """Whether two tokens share a bucket in some round, and whether they are then near enough in it."""
    order = ids.sort(dim=-1, stable=True).indices
    slots = order.argsort(dim=-1)
    same = ids[..., :, None] == ids[..., None, :]
    distance = slots[..., :, None] - slots[..., None, :]
    near = (distance <= _reach(options, options.n_chunks_before)) & (
        distance >= (0 if options.causal else -_reach(options, options.after))
    )
    return same.any(dim=2), (same & near).any(dim=2)


def _reach(options: LSHOptions, chunks: int) -> int:
    """How far in the sorted order a query sees at most: a window of chunks reaches farthest from its end."""
    return chunks * options.chunk_length + (0 if options.strict else options.chunk_length - 1)


def output_error(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq dim"],
    ids: Int[Tensor, "batch heads n_hashes seq"],
    *,
    options: LSHOptions,
) -> float:
    """‖LSH attention − full attention‖ / ‖full attention‖ of the layer's own vectors."""
    exact = full_attention(qk, v, causal=options.causal, logit_scale=options.logit_scale)
    hashed = attend(qk, v, buckets=ids.int(), padding_mask=None, options=options)
    return float((hashed - exact).norm() / exact.norm())


def balance(ids: Int[Tensor, "batch heads n_hashes seq"], *, n_buckets: Buckets) -> Balance:
    """Largest bucket of a round over the mean one, and the entropy of the sizes."""
    count = buckets.total(n_buckets)
    sizes = torch.zeros(*ids.shape[:-1], count, dtype=torch.float64, device=ids.device)
    shares = sizes.scatter_add_(-1, ids, torch.ones_like(ids, dtype=sizes.dtype)) / ids.shape[-1]
    entropies = torch.special.entr(shares).sum(dim=-1) / math.log(2)
    return Balance(float(shares.amax(dim=-1).mean() * count), float(entropies.mean()))
