"""How near an attention layer comes to its floor: its matrix products at the rate that was measured beside.

The rate is the best one that the trial saw, before or after its timed steps.
"""

from __future__ import annotations

from harness.metrics.names import column_name
from harness.metrics.time import columns as time_columns
from harness.record import TrialRecord

METRICS = frozenset({"floor_flops", "gemm_flop_per_s"})
_PHASES = ("forward", "backward")


def columns(record: TrialRecord) -> dict[str, float]:
    """`floor_s`, `share_of_floor` = `floor_s` / `step_s`, both also by phase, and the rate behind them."""
    rate = max(record.values("gemm_flop_per_s"), default=0.0)
    flops = [record.values("floor_flops", phase=phase) for phase in _PHASES]
    if rate <= 0 or not all(flops):
        return {}
    floors = dict(zip(_PHASES, (values[-1] / rate for values in flops), strict=True))
    times = time_columns(record)
    result = {"gemm_flop_per_s": rate, "floor_s": sum(floors.values())}
    shares = {phase: _share(floor, times.get(f"{phase}_s")) for phase, floor in floors.items()}
    shares[""] = _share(result["floor_s"], times.get("step_s"))
    result |= {column_name("floor_s", phase=phase): floor for phase, floor in floors.items()}
    return result | {
        column_name("share_of_floor", phase=phase or None): share
        for phase, share in shares.items()
        if share is not None
    }


def _share(floor_s: float, took_s: float | None) -> float | None:
    return floor_s / took_s if took_s else None
