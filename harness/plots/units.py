"""Metrics in the units of an axis: per cent, MiB, milliseconds."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pandas as pd

from harness.metrics.catalogue import Metric

Numbers = TypeVar("Numbers", float, pd.DataFrame, "pd.Series[float]", np.ndarray)

_FACTORS = {"fraction": 100.0, "bytes": 2.0**-20, "s": 1000.0, "flop": 1e-9, "flop/s": 1e-9}
_NAMES = {
    "fraction": "%",
    "bytes": "MiB",
    "s": "ms",
    "flop": "GFLOP",
    "flop/s": "GFLOP/s",
    "tokens/s": "tokens/s",
}


def in_axis_units(numbers: Numbers, *, unit: str) -> Numbers:
    """Values of that unit in the unit of an axis."""
    return numbers * _FACTORS.get(unit, 1.0)


def axis_label(metric: Metric) -> str:
    """The metric with the unit of its axis."""
    name = _NAMES.get(metric.unit)
    label = metric.label[:1].upper() + metric.label[1:]
    return f"{label} ({name})" if name else label
