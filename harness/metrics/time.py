"""How long a step takes: medians and percentiles after the warm-up, and tokens per second."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

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
            ordered = sorted(values)
            result[metric] = median(ordered)
            result |= {f"{metric}.{name}": quantile(ordered, q) for name, q in _QUANTILES.items()}
    tokens = record.values("tokens_per_step")
    if tokens and result.get("step_s", 0.0) > 0:
        result = {"tokens_per_s": median(tokens) / result["step_s"], **result}
    others = record.values("others_cpu")
    if others:
        result["others_cpu"] = statistics.fmean(others)
    return result


def after_warm_up(values: Sequence[float]) -> Sequence[float]:
    """The values without the slow ones at the start.

    Leading values above the 90th percentile of the second half are warm-up; at most half are dropped.
    """
    half = len(values) // 2
    if half < 2:
        return values
    limit = quantile(sorted(values[half:]), 0.9)
    start = 0
    while start < half and values[start] > limit:
        start += 1
    return values[start:]


def median(values: Sequence[float]) -> float:
    """The one in the middle, or between the two that are; nan if one of them is."""
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def quantile(ordered: Sequence[float], q: float) -> float:
    """A quantile of sorted values, between neighbours by a straight line, as numpy takes it.

    Without numpy, which takes ten times as long for as few values as a trial has.
    """
    if any(map(math.isnan, ordered)):
        return math.nan
    place = (len(ordered) - 1) * q
    below = math.floor(place)
    low, high = ordered[below], ordered[min(below + 1, len(ordered) - 1)]
    share = place - below
    if share == 0 or low == high:
        return low
    return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)
