"""Every quantity that no metric claims: its median, so that a new probe needs no change here."""

from __future__ import annotations

from collections import defaultdict

from harness.metrics.names import column_name, pooled
from harness.metrics.time import median
from harness.record import TrialRecord


def columns(record: TrialRecord, *, claimed: frozenset[str]) -> dict[str, float]:
    """Medians of the unclaimed samples, pooled over hash seeds."""
    values: dict[str, list[float]] = defaultdict(list)
    for sample in record.samples:
        if sample.metric not in claimed:
            values[column_name(sample.metric, phase=sample.phase, at=pooled(sample.at))] += sample.values
    return {column: median(found) for column, found in values.items() if found}
