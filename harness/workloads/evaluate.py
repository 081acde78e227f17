"""Evaluate weights that another trial has trained, under other settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from harness.record import Measurement, Outcome
from harness.workloads.session import open_session
from harness.workloads.weights import load_weights, weights_module
from harness.workloads.workload import Workload

if TYPE_CHECKING:
    from harness.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class Evaluate(Workload):
    """What `harness evaluate` runs: the settings of `evaluate`, and none as trained, on given weights.

    Args:
        weights: file that `train.save_weights=true` has left.
    """

    timed: ClassVar[bool] = False

    weights: str

    def backend(self, spec: TrialSpec) -> str:
        """As of any workload, for a task that there is an evaluation set of, where weights can be read."""
        spec.task.check_evaluation()
        weights_module()
        return super().backend(spec)

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        session = open_session(spec)
        load_weights(session.model, Path(self.weights))
        progress("evaluating")
        samples = session.evaluate(spec.task.evaluation_set(seed=spec.seed))
        return Measurement(
            outcome=Outcome(status="ok"), samples=tuple(sample for sample in samples if sample.at)
        )
