"""Measure a hash family without training: how often vectors collide, what of full attention it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from harness.record import Measurement, Outcome, Sample
from harness.workloads.session import Session, open_session, stream_seed
from harness.workloads.workload import Workload
from reformer import HashFamily, ReformerLM, full_attention
from reformer.attention.modules import Attending, AttentionCall, SharedQueryKeyAttention
from reformer.attention.options import LSHOptions
from reformer.attention.reference import times_shown
from reformer.hashing import Buckets, buckets

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Beyond the largest distance a curve says nothing new: there vectors are opposite to each other.
_OPPOSITE = {"angle": math.pi, "flip_rate": 1.0}
_UNITS = {"recall": "fraction", "bucket_max_over_mean": "ratio", "bucket_entropy_bits": "bits"}
#: Draws hashed at once; bounds the memory of a curve.
_DRAWS_AT_ONCE = 2000


@dataclass(frozen=True, kw_only=True)
class Hashing(Workload):
    """Collision curve, recall and bucket balance of the trial's hash family; nothing is trained.

    - `collision`: a curve of how often two vectors share a bucket, by their distance, with the closed form
      where there is one. Families whose buckets depend on other tokens have none.
    - `recall`: share of the weights of full attention that falls on keys which LSH attention shows, on the
      fresh model's own queries. A query's own key, which full attention uses last, counts like any other.
    - `bucket_max_over_mean`, `bucket_entropy_bits`: how evenly the same queries fill the buckets of a round.

    The last three have one value a hash seed of `evaluate.hash_seeds`.

    Args:
        points: distances on the collision curve, from equal to opposite vectors.
        draws: pairs of vectors a point, each under a fresh draw of the family.
        sequences: sequences of the task that recall and balance are measured on.
    """

    points: int = 25
    draws: int = 20_000
    sequences: int = 8

    def __post_init__(self) -> None:
        for name, least in (("points", 2), ("draws", 2), ("sequences", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"workload.{name}={getattr(self, name)}: must be at least {least}")

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        config = spec.reformer_config()
        progress("collisions")
        curve = collision_curve(
            spec.hashing,
            n_buckets=config.bucket_count,
            dim=config.head_width,
            points=self.points,
            draws=self.draws,
            generator=torch.Generator().manual_seed(stream_seed("collisions", spec.seed)),
        )
        progress("recall")
        return Measurement(
            outcome=Outcome(status="ok"),
            samples=tuple(_on_a_model(spec, sequences=self.sequences)),
            series={"collision": curve} if curve else {},
            theory={
                "distance": spec.hashing.distance,
                "n_buckets": "×".join(str(factor) for factor in buckets.factors(config.bucket_count)),
                "d_head": float(config.head_width),
            },
        )


def collision_curve(
    hashing: HashFamily,
    *,
    n_buckets: Buckets,
    dim: int,
    points: int,
    draws: int,
    generator: torch.Generator,
) -> dict[str, list[float]]:
    """Columns `distance`, `rate`, `standard_error`, and `theory` if there is a closed form.

    Each draw is a head of its own: a vector, and a partner at every distance. At one distance the draws are
    independent of each other, so the standard error is that of a share.
    """
    if not hashing.token_wise:
        return {}
    distances = torch.linspace(0, _OPPOSITE[hashing.distance], points, dtype=torch.float64).tolist()
    partners = _at_angles if hashing.distance == "angle" else _at_flip_rates
    hits = torch.zeros(points, dtype=torch.float64)
    for start in range(0, draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, draws - start)
        vectors = partners(torch.randn(count, 1, dim, generator=generator), distances, generator=generator)
        ids = hashing(vectors[None], n_hashes=1, n_buckets=n_buckets, generator=generator)[0, :, 0]
        hits += (ids[:, 1:] == ids[:, :1]).sum(dim=0)
    rates = hits / draws
    curve = {
        "distance": distances,
        "rate": rates.tolist(),
        "standard_error": (rates * (1 - rates) / draws).sqrt().tolist(),
    }
    theory = [hashing.collision_probability(x, n_buckets=n_buckets, dim=dim) for x in distances]
    known = [value for value in theory if value is not None]
    return {**curve, "theory": known} if len(known) == points else curve


def _at_angles(
    first: Float[Tensor, "draws 1 dim"], angles: list[float], *, generator: torch.Generator
) -> Float[Tensor, "draws tokens dim"]:
    """Each vector at unit length, and turned by every angle towards a random direction."""
    first = F.normalize(first, dim=-1)
    other = torch.randn(first.shape, generator=generator)
    other = F.normalize(other - (other * first).sum(dim=-1, keepdim=True) * first, dim=-1)
    turn = torch.tensor(angles, dtype=first.dtype)[:, None]
    return torch.cat([first, turn.cos() * first + turn.sin() * other], dim=1)


def _at_flip_rates(
    first: Float[Tensor, "draws 1 dim"], rates: list[float], *, generator: torch.Generator
) -> Float[Tensor, "draws tokens dim"]:
    """Each vector, and with every coordinate's sign flipped at each rate."""
    chance = torch.rand(first.shape, generator=generator)
    flipped = chance < torch.tensor(rates, dtype=first.dtype)[:, None]
    return torch.cat([first, torch.where(flipped, -first, first)], dim=1)


def _on_a_model(spec: TrialSpec, *, sequences: int) -> list[Sample]:
    """Recall and bucket balance on a fresh model's queries; nothing if no layer shares them with keys."""
    session = open_session(spec)
    queries = fresh_queries(session, sequences=sequences)
    if not queries:
        return []
    by_seed = [
        _mechanism(session.ours, queries, hash_seed=hash_seed) for hash_seed in spec.evaluate.hash_seeds
    ]
    return [
        Sample(metric=metric, unit=unit, values=tuple(found[metric] for found in by_seed))
        for metric, unit in _UNITS.items()
    ]


@torch.no_grad()
def _mechanism(
    model: ReformerLM, queries: Mapping[int, Float[Tensor, "batch heads seq dim"]], *, hash_seed: int
) -> dict[str, float]:
    """Recall and bucket balance under the buckets that the model itself would use: means over layers."""
    config = model.config
    call = AttentionCall(attending=Attending(kind="lsh", hash_seed=hash_seed))
    means = dict.fromkeys(_UNITS, 0.0)
    for layer in _shared_layers(model):
        qk = queries[layer.layer]
        ids = layer.hash_into_buckets(qk, call=call)
        found = (
            recall(qk, ids, options=config.lsh_options()),
            *balance(ids, n_buckets=config.bucket_count),
        )
        for metric, value in zip(_UNITS, found, strict=True):
            means[metric] += value / len(queries)
    return means


@torch.no_grad()
def fresh_queries(session: Session, *, sequences: int) -> dict[int, Float[Tensor, "batch heads seq dim"]]:
    """The shared queries and keys of every layer that has some, on sequences of the task, by layer."""
    seen: dict[int, Tensor] = {}

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, SharedQueryKeyAttention)
        seen[layer.layer], _ = layer.project(*inputs)

    handles = [layer.register_forward_pre_hook(keep) for layer in _shared_layers(session.ours)]
    batch = session.spec.task.training_batch(seed=session.spec.seed, step=0, batch_size=sequences)
    session.model.eval()
    session.model(torch.from_numpy(batch.tokens).to(session.device))
    for handle in handles:
        handle.remove()
    return seen


def _shared_layers(model: ReformerLM) -> list[SharedQueryKeyAttention]:
    return [module for module in model.modules() if isinstance(module, SharedQueryKeyAttention)]


def recall(
    qk: Float[Tensor, "batch heads seq dim"],
    ids: Int[Tensor, "batch heads n_hashes seq"],
    *,
    options: LSHOptions,
) -> float:
    """Share of full attention's weights that falls on keys which LSH attention shows: mean over the queries.

    The first query is left out: it has no key but its own, which is always shown.
    """
    seq = qk.shape[2]
    own = torch.eye(seq, dtype=qk.dtype, device=qk.device).expand(1, qk.shape[1], seq, seq)
    real = torch.ones(1, seq, dtype=torch.bool, device=qk.device)
    shares = []
    # One sequence at a time, as all pairs of it are looked at.
    for row in range(len(qk)):
        # Values that are one-hot vectors make an attention's output its weights.
        weights = full_attention(qk[row : row + 1], own, logit_scale=options.logit_scale)
        shown = times_shown(ids[row : row + 1], padding_mask=real, options=options) > 0
        shares.append(float((weights * shown).sum(dim=-1)[..., 1:].mean()))
    return math.fsum(shares) / len(shares)


def balance(ids: Int[Tensor, "batch heads n_hashes seq"], *, n_buckets: Buckets) -> tuple[float, float]:
    """Largest bucket of a round over the mean one, entropy of the sizes in bits: means over rounds."""
    count = buckets.total(n_buckets)
    sizes = torch.zeros(*ids.shape[:-1], count, dtype=torch.float64, device=ids.device)
    shares = sizes.scatter_add_(-1, ids, torch.ones_like(ids, dtype=sizes.dtype)) / ids.shape[-1]
    entropies = torch.special.entr(shares).sum(dim=-1) / math.log(2)
    return float(shares.amax(dim=-1).mean() * count), float(entropies.mean())
