"""How long a step takes: medians and 90th percentiles after the warm-up, and tokens per second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.record import TrialRecord

METRICS = frozenset({"step_s", "forward_s", "backward_s", "optimizer_s"})
_ORDER = ("step_s", "forward_s", "backward_s", "optimizer_s")


def columns(record: TrialRecord) -> dict[str, float]:
    """Medians, p90s and throughput of the steps as trained."""
    result: dict[str, float] = {}
    for metric in _ORDER:
        values = after_warm_up(record.values(metric))
        if len(values):
            result[metric] = float(np.median(values))
            result[f"{metric}.p90"] = float(np.quantile(values, 0.9))
    tokens = record.values("tokens_per_step")
    if tokens and result.get("step_s", 0.0) > 0:
        result = {"tokens_per_s": float(np.median(tokens)) / result["step_s"], **result}
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
