"""What is kept of one trial: raw samples with units, never just statistics.

A record is one JSON file. It carries everything that a report or a gate needs, so that neither has to
import torch, and a new metric can be derived without running anything again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1

#: Every way a trial can end. The first five are data; `error` and `killed` make `harness run` exit 1.
STATUSES = ("ok", "out_of_memory", "timeout", "diverged", "invalid", "error", "killed")
FAILED_STATUSES = ("error", "killed")

#: A place in the train×eval grid, for example ``{"n_hashes": 8, "hash_seed": 1}``; empty: as trained.
At = Mapping[str, int | str]


class RecordError(ValueError):
    """A file is not a trial record that this version can read; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Raw values of one quantity.

    Args:
        metric: name with its unit as suffix where it has one (`forward_s`, `peak_alloc_bytes`).
        unit: `s`, `bytes`, `flop`, `flop/s`, `tokens`, `nats`, `count` or `ratio`.
        values: one entry a measurement, in the order they were taken.
        phase: `forward`, `backward` or `optimizer` where the quantity belongs to one of them.
        at: the evaluation setting it was taken under; empty means "as trained".
    """

    metric: str
    unit: str
    values: tuple[float, ...]
    phase: str | None = None
    at: At = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. Failing is data: see `STATUSES`."""

    status: str
    message: str = ""
    traceback: str = ""
    stderr: tuple[str, ...] = ()
    signal: int | None = None
    rss_bytes_at_death: int | None = None
    checksum: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise RecordError(f"outcome {self.status!r} is none of {', '.join(STATUSES)}")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a workload hands back: the part of a record that only the measuring process can know."""

    outcome: Outcome
    samples: tuple[Sample, ...] = ()
    series: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    theory: Mapping[str, float | str | None] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One measured trial, as stored in ``results/<study>/trials/<trial_id>.json``.

    Args:
        trial_id: first 12 hex digits of the sha256 over the canonical JSON of the spec.
        experiment: name of the preset it came from; `default` without one.
        cell: swept keys with the levels as typed, and the seed.
        code: fingerprint of the measured code; (trial_id, code) decides *done* or *stale*.
        spec: the decoded spec as plain data.
        series: named curves, each a mapping of equally long columns.
        theory: numbers from formulas (floors, parameter counts), computed where the classes are.
        started_at: ISO 8601, UTC.
    """

    trial_id: str
    experiment: str
    cell: Mapping[str, Any]
    code: str
    spec: Mapping[str, Any]
    outcome: Outcome
    environment: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()
    series: Mapping[str, Mapping[str, list[float]]] = field(default_factory=dict)
    theory: Mapping[str, float | str | None] = field(default_factory=dict)
    started_at: str = ""
    duration_s: float = 0.0
    schema_version: int = SCHEMA_VERSION

    def values(self, metric: str, *, phase: str | None = None, at: At | None = None) -> tuple[float, ...]:
        """Raw values of one quantity; empty if it was not measured."""
        wanted = dict(at or {})
        for sample in self.samples:
            if sample.metric == metric and sample.phase == phase and dict(sample.at) == wanted:
                return sample.values
        return ()


def to_json(record: TrialRecord | Measurement) -> str:
    """Standard JSON: a number that is not finite is written as a string (`"nan"`, `"inf"`, `"-inf"`)."""
    return json.dumps(_finite(asdict(record)), indent=1, allow_nan=False)


def from_json(text: str) -> TrialRecord:
    """Read a record of this or an older schema.

    Raises:
        RecordError: torn JSON, something else than a record, or a newer schema.
    """
    data = _parse(text)
    version = data.get("schema_version")
    if not isinstance(version, int) or "trial_id" not in data:
        raise RecordError("not a trial record (no schema_version or trial_id)")
    if version > SCHEMA_VERSION:
        raise RecordError(f"schema {version} is newer than this harness knows ({SCHEMA_VERSION})")
    try:
        return TrialRecord(**{**data, **_parts(data)})
    except (TypeError, KeyError, ValueError) as error:
        raise RecordError(f"not a trial record of schema {version}: {error}") from error


def measurement_from_json(text: str) -> Measurement:
    """Read what a worker wrote.

    Raises:
        RecordError: the worker did not write a measurement.
    """
    data = _parse(text)
    try:
        return Measurement(**{**data, **_parts(data)})
    except (TypeError, KeyError, ValueError) as error:
        raise RecordError(f"the worker's answer is not a measurement: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RecordError(f"not JSON ({error})") from error
    if not isinstance(data, dict):
        raise RecordError("not a JSON object")
    return data


def _parts(data: Mapping[str, Any]) -> dict[str, Any]:
    outcome = dict(data["outcome"])
    outcome["stderr"] = tuple(outcome.get("stderr", ()))
    samples = tuple(
        Sample(**{**sample, "values": tuple(float(value) for value in sample["values"])})
        for sample in data.get("samples", ())
    )
    series = {
        name: {column: [float(value) for value in values] for column, values in columns.items()}
        for name, columns in data.get("series", {}).items()
    }
    return {"outcome": Outcome(**outcome), "samples": samples, "series": series}


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value
