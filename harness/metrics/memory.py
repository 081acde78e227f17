"""How much memory a step takes: by phase, and the most over the phases."""

from __future__ import annotations

from harness.metrics.names import column_name
from harness.record import TrialRecord

METRICS = frozenset({"peak_alloc_bytes", "peak_reserved_bytes", "peak_rss_bytes", "saved_bytes"})
_ORDER = ("peak_alloc_bytes", "peak_reserved_bytes", "peak_rss_bytes", "saved_bytes")


def columns(record: TrialRecord) -> dict[str, float]:
    """`peak_alloc_bytes`, `peak_alloc_bytes.forward` …: a peak without a phase is the highest of all."""
    by_phase: dict[str, dict[str | None, float]] = {}
    for sample in record.samples:
        if sample.metric in METRICS and sample.values and not sample.at:
            phases = by_phase.setdefault(sample.metric, {})
            phases[sample.phase] = max(sample.values)
    result: dict[str, float] = {}
    for metric in _ORDER:
        phases = by_phase.get(metric, {})
        if phases:
            result[metric] = phases.get(None, max(phases.values()))
    for metric in _ORDER:
        for phase, value in by_phase.get(metric, {}).items():
            if phase is not None:
                result[column_name(metric, phase=phase)] = value
    return result
