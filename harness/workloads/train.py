"""Train, evaluate under every setting, then measure a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from harness.forecast import Forecast, forecast_of_steps
from harness.probes import OthersWatch, Probe, Stopwatch, Together
from harness.record import Measurement, Outcome, Sample
from harness.tasks.task import Batch
from harness.workloads import mechanism
from harness.workloads.measure import FOOTPRINT_STEPS, measure_footprint
from harness.workloads.session import Session, open_session, step_sizes
from harness.workloads.weights import keep_weights, weights_module
from harness.workloads.workload import Workload

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Seconds between two progress lines.
PROGRESS_EVERY_S = 1.0
#: Of the evaluation set, on which every pair of tokens is looked at.
MECHANISM_SEQUENCES = 2


@dataclass(frozen=True, kw_only=True)
class Train(Workload):
    """Every training step is a timing sample; memory and cost are measured in steps of their own."""

    trains: ClassVar[bool] = True

    def backend(self, spec: TrialSpec) -> str:
        """As of any workload, for a task that there is an evaluation set of.

        Raises:
            ValueError: the task, or the backend that is asked for, cannot serve that spec; or weights cannot
                be kept here.
        """
        spec.task.check_evaluation()
        if spec.train.save_weights:
            weights_module()
        return super().backend(spec)

    def forecast(self, spec: TrialSpec) -> Forecast | None:
        """Of its steps, those that measure included, and of the evaluation under every setting."""
        settings = 1 + len(spec.evaluate.settings())
        return forecast_of_steps(
            spec,
            steps=spec.train.steps + FOOTPRINT_STEPS,
            evaluated_tokens=settings * spec.task.evaluation_tokens,
        )

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        return self._run(spec, progress=progress, weights=None)

    def keeping(self, spec: TrialSpec, *, progress: Callable[[str], None], weights: Path) -> Measurement:
        """The same, and the trained weights in that file."""
        return self._run(spec, progress=progress, weights=weights)

    def _run(self, spec: TrialSpec, *, progress: Callable[[str], None], weights: Path | None) -> Measurement:
        session = open_session(spec)
        evaluation = spec.task.evaluation_set(seed=spec.seed)
        theory: dict[str, float | str | None] = {
            "quality": spec.task.quality,
            "evaluation_sha256": evaluation.sha256(),
            **spec.task.theory(evaluation),
        }
        stopwatch = Together(OthersWatch(), Stopwatch(session.device))
        forecast = self.forecast(spec)
        theory |= {} if forecast is None else forecast.theory()
        losses = _train(session, stopwatch, progress=progress)
        series = {"train": {"step": [float(step) for step in range(len(losses))], "loss": losses}}
        common = (*step_sizes(session), *stopwatch.samples())
        message = _no_number("loss", losses[-1], f"at step {len(losses) - 1} of {spec.train.steps}")
        quality: tuple[Sample, ...] = ()
        if not message:
            progress("evaluating")
            quality = tuple(session.evaluate(evaluation))
            # The last step can ruin the weights when the last loss is known already.
            as_trained = next(sample.values[0] for sample in quality if sample.metric == "nll_nats")
            message = _no_number("evaluation loss", as_trained, f"after {len(losses)} steps")
        if message:
            outcome = Outcome(status="diverged", message=message)
            return Measurement(outcome=outcome, samples=common, series=series, theory=theory)
        if weights is not None:
            keep_weights(session.model, weights)
        progress("measuring memory and cost")
        footprint, method = measure_footprint(
            session,
            lambda batch, probe: session.train_step(batch, step=spec.train.steps, probe=probe),
            warm=True,
        )
        progress("measuring the mechanism")
        why, by_layer = _mechanism(session, evaluation)
        return Measurement(
            outcome=Outcome(status="ok", checksum=losses[-1].hex()),
            samples=(*common, *quality, *footprint, *why),
            series={**series, **by_layer},
            theory=theory,
            environment={"mem_method": method},
        )


def _mechanism(
    session: Session, evaluation: Batch
) -> tuple[tuple[Sample, ...], dict[str, dict[str, list[float]]]]:
    """What the trained weights make of hashing and of reversing, on the beginning of some sequences."""
    longest = min(mechanism.LONGEST, session.spec.task.length)
    tokens, targets = (
        torch.from_numpy(x[:MECHANISM_SEQUENCES, :longest]).to(session.device)
        for x in (evaluation.tokens, evaluation.targets)
    )
    session.model.eval()
    seeds = session.spec.evaluate.hash_seeds
    samples = (
        *mechanism.hashing_samples(session.ours, tokens, hash_seeds=seeds),
        *mechanism.model_samples(session.ours, tokens, targets),
    )
    by_layer = mechanism.layer_series(session.ours, tokens)
    session.model.train()
    return samples, by_layer


def _no_number(what: str, value: float, when: str) -> str:
    """What to tell of a value that is not finite; nothing if it is."""
    return "" if math.isfinite(value) else f"the {what} was {value} {when}"


def _train(session: Session, stopwatch: Probe, *, progress: Callable[[str], None]) -> list[float]:
    """Train until the last step or the first loss that is no number; returns the losses."""
    losses: list[float] = []
    told = time.monotonic()
    for step in range(session.spec.train.steps):
        losses.append(float(session.train_step(session.batch(step), step=step, probe=stopwatch)))
        if not math.isfinite(losses[-1]):
            break
        if time.monotonic() - told > PROGRESS_EVERY_S:
            told = time.monotonic()
            progress(f"step {step + 1}/{session.spec.train.steps} loss {losses[-1]:.3f}")
    return losses
