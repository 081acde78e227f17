"""Train, evaluate under every setting, then measure a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.probes import Stopwatch
from harness.record import Measurement, Outcome, Sample
from harness.workloads.measure import measure_footprint
from harness.workloads.session import Session, open_session, step_sizes
from harness.workloads.workload import Workload

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Seconds between two progress lines.
PROGRESS_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Train(Workload):
    """Every training step is a timing sample; memory and cost are measured in steps of their own."""

    def backend(self, spec: TrialSpec) -> str:
        """As of any workload, for a task that there is an evaluation set of.

        Raises:
            ValueError: the task, or the backend that is asked for, cannot serve that spec.
        """
        spec.task.check_evaluation()
        return super().backend(spec)

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        session = open_session(spec)
        evaluation = spec.task.evaluation_set(seed=spec.seed)
        theory = {
            "quality": spec.task.quality,
            "evaluation_sha256": evaluation.sha256(),
            **spec.task.theory(evaluation),
        }
        stopwatch = Stopwatch(session.device)
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
        progress("measuring memory and cost")
        footprint, method = measure_footprint(
            session,
            lambda batch, probe: session.train_step(batch, step=spec.train.steps, probe=probe),
            warm=True,
        )
        return Measurement(
            outcome=Outcome(status="ok", checksum=losses[-1].hex()),
            samples=(*common, *quality, *footprint),
            series=series,
            theory=theory,
            environment={"mem_method": method},
        )


def _no_number(what: str, value: float, when: str) -> str:
    """What to tell of a value that is not finite; nothing if it is."""
    return "" if math.isfinite(value) else f"the {what} was {value} {when}"


def _train(session: Session, stopwatch: Stopwatch, *, progress: Callable[[str], None]) -> list[float]:
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
