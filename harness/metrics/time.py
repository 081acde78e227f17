"""How long a step takes: medians and percentiles after the warm-up, and tokens per second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.record import TrialRecord

METRICS = frozenset({"step_s", "forward_s", "backward_s", "optimizer_s", "others_cpu"})
#: A larger share of the CPUs, taken by others, makes times doubtful.
DISTURBED = 0.05
_QUANTILES = {"p90": 0.9, "p99": 0.99}
_ORDER = ("step_s", "forward_s", "backward_s", "optimizer_s")


def columns(record: TrialRecord) -> dict[str, float]:
    """Medians, percentiles and throughput of the steps as trained, and what others took of the CPUs."""
    result: dict[str, float] = {}
    for metric in _ORDER:
        values = after_warm_up(record.values(metric))
        if len(values):
            result[metric] = float(np.median(values))
            result |= {f"{metric}.{name}": float(np.quantile(values, q)) for name, q in _QUANTILES.items()}
    tokens = record.values("tokens_per_step")
    if tokens and result.get("step_s", 0.0) > 0:
        result = {"tokens_per_s": float(np.median(tokens)) / result["step_s"], **result}
    others = record.values("others_cpu")
    if others:
        result["others_cpu"] = float(np.mean(others))
    return result


def after_warm_up(values: Sequence[float]) -> Sequence[float]:
    """The values without the slow ones at the start.

    Leading values above the 90th percentile of the second half are warm-up; at most half are dropped.
    """
    half = len(values) // 2
    if half < 2:
        return values
    limit = float(np.quantile(values[half:], 0.9))
    start = 0
    while start < half and values[start] > limit:
        start += 1
    return values[start:]
