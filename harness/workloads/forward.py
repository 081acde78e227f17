"""Measure forward passes without gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from harness.probes import Blind, OthersWatch, Probe, Stopwatch, Together
from harness.record import Measurement, Outcome
from harness.workloads.measure import measure_footprint
from harness.workloads.sampling import Sampling
from harness.workloads.session import Session, open_session, step_sizes
from harness.workloads.workload import Workload

if TYPE_CHECKING:
    from harness.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class Forward(Workload):
    """Time, memory and cost of the scores of a batch, from fresh weights in eval mode.

    Args:
        warmup_steps: passes before the clock counts.
        timed_steps: passes that it counts, at most.
        precision: what is known of a pass so well that no further one is needed (see `Sampling`); 0 is never.
    """

    warmup_steps: int = 2
    timed_steps: int = 20
    precision: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.timed_steps < 1:
            raise ValueError(
                f"workload.warmup_steps={self.warmup_steps}, workload.timed_steps={self.timed_steps}: "
                "give at least 0 and 1"
            )
        self._sampling()

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        session = open_session(spec)
        session.model.eval()
        for step in range(self.warmup_steps):
            _score(session, session.batch(step), Blind())
        stopwatch, sampling = Stopwatch(session.device), self._sampling()
        timing = Together(OthersWatch(), stopwatch)
        for step in sampling.steps(stopwatch.step_seconds):
            _score(session, session.batch(self.warmup_steps + step), timing)
            progress(f"pass {step + 1}/{self.timed_steps}")
        footprint, method = measure_footprint(
            session, lambda batch, probe: _score(session, batch, probe), warm=True, tell=progress
        )
        return Measurement(
            outcome=Outcome(status="ok"),
            samples=(*step_sizes(session), *timing.samples(), *footprint),
            theory={"stopped_by": sampling.stopped_by},
            environment={"mem_method": method},
        )

    def _sampling(self) -> Sampling:
        return Sampling(at_most=self.timed_steps, precision=self.precision)


@torch.no_grad()
def _score(session: Session, batch: tuple[Tensor, Tensor], probe: Probe) -> None:
    with probe.phase("forward"):
        session.loss(batch)
