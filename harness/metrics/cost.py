"""What a step costs whatever the machine: floating-point operations, operators, parameters."""

from __future__ import annotations

from collections.abc import Mapping

from harness.record import TrialRecord

METRICS = frozenset({"flops", "operators", "parameters"})
#: What the cost model predicts.
PREDICTED = ("flops", "saved_bytes", "peak_alloc_bytes")
_ORDER = ("flops", "operators", "parameters")


def columns(record: TrialRecord) -> dict[str, float]:
    """Counts as they were taken; the last one, should a count have been repeated."""
    return {metric: values[-1] for metric in _ORDER if (values := record.values(metric))}


def residuals(record: TrialRecord, measured: Mapping[str, float]) -> dict[str, float]:
    """`flops_residual` …: how much more was measured than the cost model predicted, as a share of that."""
    result = {}
    for metric in PREDICTED:
        predicted, value = record.theory.get(f"predicted_{metric}"), measured.get(metric)
        if isinstance(predicted, (int, float)) and predicted > 0 and value is not None:
            result[f"{metric}_residual"] = value / predicted - 1
    return result
