"""Measure training steps without training to any end."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.forecast import Forecast, forecast_of_steps
from harness.peers import OURS, PEERS, check_implementation, versions
from harness.probes import Blind, OthersWatch, Probe, Stopwatch, Together
from harness.record import Measurement, Outcome
from harness.workloads.floor import model_floor_samples, product_rates_of, rate_sample
from harness.workloads.measure import FOOTPRINT_STEPS, measure_footprint
from harness.workloads.sampling import Sampling
from harness.workloads.session import open_session, step_sizes
from harness.workloads.whereabouts import Whereabouts
from harness.workloads.workload import OMITTED, Workload

if TYPE_CHECKING:
    from harness.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class TrainStep(Workload):
    """Time, memory and cost of a training step from fresh weights; no quality.

    The rate of the machine's matrix products is taken before and after the timed steps, and the floor follows
    from it.

    Args:
        implementation: `ours`, or the peer whose model it is; a Transformer with torch's attention is ours
            with `attention=full_standard` and `model.residual=plain`.
        warmup_steps: steps before the clock counts.
        timed_steps: steps that it counts, at most.
        precision: what is known of a step so well that no further one is needed (see `Sampling`); 0 is never.
    """

    implementation: str = OURS
    warmup_steps: int = 2
    timed_steps: int = 10
    precision: float = field(default=0.0, metadata={OMITTED: True})

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        if self.warmup_steps < 0 or self.timed_steps < 1:
            raise ValueError(
                f"workload.warmup_steps={self.warmup_steps}, workload.timed_steps={self.timed_steps}: "
                "give at least 0 and 1"
            )
        self._sampling()

    def backend(self, spec: TrialSpec) -> str:
        """Ours by its backend, a peer by its name."""
        if self.implementation == OURS:
            return super().backend(spec)
        PEERS[self.implementation].check_model(spec)
        return self.implementation

    def _sampling(self) -> Sampling:
        return Sampling(at_most=self.timed_steps, precision=self.precision)

    def forecast(self, spec: TrialSpec) -> Forecast | None:
        """Of a model of ours: a peer's is not known."""
        if self.implementation != OURS:
            return None
        return forecast_of_steps(spec, steps=self.warmup_steps + self.timed_steps + FOOTPRINT_STEPS)

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        forecast = self.forecast(spec)
        session = open_session(spec, implementation=self.implementation)
        rates = [product_rates_of(spec)]
        stopwatch, sampling = Stopwatch(session.device), self._sampling()
        timing = Together(OthersWatch(), stopwatch)
        loss, steps = math.nan, self.warmup_steps + self.timed_steps

        def take(step: int, watching: Probe) -> float:
            words = f"step {step + 1}/{steps}"
            probe = Whereabouts(watching, session.model, step=words, tell=progress)
            found = float(session.train_step(session.batch(step), step=step, probe=probe))
            progress(words)
            return found

        for step in range(self.warmup_steps):
            loss = take(step, Blind())
        for step in sampling.steps(stopwatch.step_seconds):
            loss = take(self.warmup_steps + step, timing)
        rates.append(product_rates_of(spec))
        footprint, method = measure_footprint(
            session,
            lambda batch, probe: session.train_step(batch, step=0, probe=probe),
            warm=True,
            tell=progress,
        )
        return Measurement(
            outcome=Outcome(status="ok", checksum=loss.hex()),
            samples=(
                *step_sizes(session),
                *timing.samples(),
                *footprint,
                *model_floor_samples(
                    spec.reformer_config(), batch=spec.train.batch_size, seq=spec.task.length
                ),
                rate_sample(*rates),
            ),
            theory={"stopped_by": sampling.stopped_by, **({} if forecast is None else forecast.theory())},
            environment={"mem_method": method, **versions(self.implementation)},
        )
