"""How much worse each metric may get: `conf/gate/NAME.yaml`, read without Hydra."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.errors import UsageError
from harness.metrics.names import is_percentile

KINDS = ("exact", "paired", "timing")
SCALES = ("ratio", "points", "absolute")
#: Metrics of which more is better; of all others less is.
HIGHER_IS_BETTER = frozenset({"accuracy", "tokens_per_s"})


@dataclass(frozen=True, kw_only=True)
class Margin:
    """What is asked of one metric.

    Args:
        kind: `exact`, `paired` or `timing`.
        scale: `ratio` (relative change), `points` (hundredths) or `absolute` (the metric's unit).
        margin: a change for the worse up to it is nobody's business.
        equivalence: an interval within ± it counts as no difference.
    """

    kind: str
    scale: str
    margin: float
    equivalence: float


@dataclass(frozen=True, kw_only=True)
class Margins:
    """What is asked of a study.

    Args:
        min_seeds: paired seeds from which their spread is used.
        process_sd: standard deviation of log time between processes running the same code.
    """

    metrics: Mapping[str, Margin]
    min_seeds: int = 3
    process_sd: float = 0.08

    def of(self, column: str) -> Margin | None:
        """The margin of a column, which covers the phases of its metric; None: not gated."""
        if "@" in column or is_percentile(column):
            return None
        return self.metrics.get(column) or self.metrics.get(column.partition(".")[0])


def read_margins(path: Path) -> Margins:
    """Read a file of margins.

    Raises:
        UsageError: it is missing or says something else; the message names the entry.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = ", ".join(sorted(entry.stem for entry in path.parent.glob("*.yaml"))) or "none"
        raise UsageError(f"no margins {path.stem!r} in {path.parent}; there: {there}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(data, dict) or not isinstance(data.get("metrics"), dict):
        raise UsageError(f"{path}: needs a mapping `metrics`")
    return Margins(
        metrics={
            str(name): _margin(entry, where=f"{path}: metrics.{name}")
            for name, entry in data["metrics"].items()
        },
        min_seeds=int(_number(data.get("min_seeds", 3), where=f"{path}: min_seeds", least=2)),
        process_sd=_number(data.get("process_sd", 0.08), where=f"{path}: process_sd"),
    )


def _margin(entry: Any, *, where: str) -> Margin:
    if not isinstance(entry, dict) or set(entry) != {"kind", "scale", "margin", "equivalence"}:
        raise UsageError(f"{where}: needs exactly kind, scale, margin, equivalence")
    for key, known in (("kind", KINDS), ("scale", SCALES)):
        if entry[key] not in known:
            raise UsageError(f"{where}.{key}: {entry[key]!r} is none of {', '.join(known)}")
    margin = _number(entry["margin"], where=f"{where}.margin")
    return Margin(
        kind=entry["kind"],
        scale=entry["scale"],
        margin=margin,
        equivalence=_number(entry["equivalence"], where=f"{where}.equivalence", least=margin),
    )


def _number(value: Any, *, where: str, least: float = 0.0) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not math.isfinite(value)
        or value < least
    ):
        raise UsageError(f"{where}: {value!r} is no number from {least:g} on")
    return float(value)
