"""Numbers from records: pure functions from the raw samples of one trial to named columns.

A metric is one file with `METRICS`, the samples that it claims, and `columns(record)`.
"""

from __future__ import annotations

from harness.metrics import cost, floor, memory, other, quality, time
from harness.record import TrialRecord

__all__ = ["columns"]

_CLAIMED = quality.METRICS | memory.METRICS | time.METRICS | cost.METRICS | floor.METRICS


def columns(record: TrialRecord) -> dict[str, float]:
    """Every metric of one trial by its column name; those not measured are absent."""
    merged: dict[str, float] = {}
    for part in (
        quality.columns(record),
        memory.columns(record),
        time.columns(record),
        cost.columns(record),
        floor.columns(record),
        other.columns(record, claimed=_CLAIMED),
    ):
        merged |= part
    merged |= cost.residuals(record, merged)
    main = {name: value for name, value in merged.items() if "@" not in name}
    return main | {name: value for name, value in merged.items() if "@" in name}
