"""What a step costs whatever the machine: floating-point operations, operators, parameters."""

from __future__ import annotations

from harness.record import TrialRecord

METRICS = frozenset({"flops", "operators", "parameters"})
_ORDER = ("flops", "operators", "parameters")


def columns(record: TrialRecord) -> dict[str, float]:
    """Counts as they were taken; the last one, should a count have been repeated."""
    return {metric: values[-1] for metric in _ORDER if (values := record.values(metric))}
