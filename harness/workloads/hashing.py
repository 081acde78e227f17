"""Measure a hash family without training: how often vectors collide, what of full attention it finds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from harness.record import Measurement, Outcome, Sample
from harness.workloads.mechanism import hashing_samples
from harness.workloads.session import open_session, stream_seed
from harness.workloads.workload import Workload
from reformer import HashFamily
from reformer.hashing import Buckets, buckets

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Beyond the largest distance a curve says nothing new: there vectors are opposite to each other.
_OPPOSITE = {"angle": math.pi, "flip_rate": 1.0}
#: Draws hashed at once; bounds the memory of a curve.
_DRAWS_AT_ONCE = 2000


@dataclass(frozen=True, kw_only=True)
class Hashing(Workload):
    """Collision curve, recall and bucket balance of the trial's hash family; nothing is trained.

    - `collision`: a curve of how often two vectors share a bucket, by their distance, with the closed form
      where there is one. Families whose buckets depend on other tokens have none.
    - `recall`: share of the weights of full attention that falls on keys which LSH attention shows, on the
      fresh model's own queries, and what the rest is lost to (see `harness.workloads.mechanism`).
    - `output_error`: relative difference of a layer's output to that of full attention.
    - `bucket_max_over_mean`, `bucket_entropy_bits`: how evenly the same queries fill the buckets of a round.

    All but the curve have one value a hash seed of `evaluate.hash_seeds`.

    Args:
        points: distances on the collision curve, from equal to opposite vectors.
        draws: pairs of vectors a point, each under a fresh draw of the family.
        sequences: sequences of the task that recall and balance are measured on.
    """

    timed: ClassVar[bool] = False

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
            samples=_on_a_fresh_model(spec, sequences=self.sequences),
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


def _on_a_fresh_model(spec: TrialSpec, *, sequences: int) -> tuple[Sample, ...]:
    session = open_session(spec)
    batch = spec.task.training_batch(seed=spec.seed, step=0, batch_size=sequences)
    tokens = torch.from_numpy(batch.tokens).to(session.device)
    return hashing_samples(session.ours, tokens, hash_seeds=spec.evaluate.hash_seeds)
