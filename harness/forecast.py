"""What a trial will cost, by the cost model, before anything runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from reformer.cost import step_cost

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: How these are called beside what is measured.
PREFIX = "predicted_"


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Costs by formula; None is what no formula tells.

    Args:
        flops: of a step.
        trial_flops: of the whole trial.
        saved_bytes: what the forward pass of a step keeps for its backward pass.
        peak_alloc_bytes: the most that a step holds.
    """

    flops: int
    trial_flops: int
    saved_bytes: int | None
    peak_alloc_bytes: int | None

    def theory(self) -> dict[str, float]:
        """As a record keeps it."""
        return {f"{PREFIX}{name}": float(value) for name, value in asdict(self).items() if value is not None}


def forecast_of_steps(spec: TrialSpec, *, steps: int, evaluated_tokens: int = 0) -> Forecast | None:
    """Of a trial that trains a language model of ours; None if the formulas do not know it.

    Args:
        steps: how many steps it takes, those included that are not timed.
        evaluated_tokens: tokens that go forward besides, over all settings.
    """
    batch, seq = spec.train.batch_size, spec.task.length
    try:
        cost = step_cost(
            spec.reformer_config(),
            batch=batch,
            seq=seq,
            optimizer=spec.train.optimizer,
            threads=spec.threads,
            compiled=spec.backend == "native",
        )
    except ValueError:
        return None
    # The formulas of memory are those of torch's allocator on a CPU, in single precision.
    known = spec.device == "cpu" and spec.dtype == "float32"
    evaluation = cost.flops_by_phase.get("forward", 0) * evaluated_tokens // (batch * seq)
    return Forecast(
        flops=cost.flops,
        trial_flops=steps * cost.flops + evaluation,
        saved_bytes=cost.saved_bytes if known else None,
        peak_alloc_bytes=cost.peak_bytes if known else None,
    )
