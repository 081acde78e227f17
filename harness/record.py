"""What is kept of one trial: raw samples with units, never just statistics.

A record is one JSON file. It carries everything that a report or a gate needs, so that neither has to
import torch, and a new metric can be derived without running anything again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1

#: Every way a trial can end. The first five are data; `error` and `killed` make `harness run` exit 1.
STATUSES = ("ok", "out_of_memory", "timeout", "diverged", "invalid", "error", "killed")
FAILED_STATUSES = ("error", "killed")

#: Seeds and repeats are smaller.
MOST_REPLICATES = 2**31

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


def trial_id(encoded: Mapping[str, Any]) -> str:
    """First 12 hex digits of the sha256 over the canonical JSON of an encoded spec."""
    text = json.dumps(encoded, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a record is about and how it ended, without what was measured."""

    trial_id: str
    experiment: str
    cell: Mapping[str, Any]
    code: str
    status: str
    message: str
    started_at: str
    duration_s: float

    @classmethod
    def of(cls, record: TrialRecord) -> Summary:
        return cls(
            trial_id=record.trial_id,
            experiment=record.experiment,
            cell=record.cell,
            code=record.code,
            status=record.outcome.status,
            message=record.outcome.message,
            started_at=record.started_at,
            duration_s=record.duration_s,
        )


#: Where parts of what `to_json` writes begin: line breaks are nowhere else but between its lines.
_MEASURED, _SERIES, _THEORY, _CLOSING = (
    f'\n "{name}":' for name in ("environment", "series", "theory", "started_at")
)


def summary_from_ends(head: str, tail: str) -> Summary | None:
    """The summary of a record from the beginning and the end of its file, which is much less to read.

    None if these do not hold what is needed, or the file is not laid out as `to_json` does it: read it all.
    """
    at, end = head.find(_MEASURED), tail.rfind(_CLOSING)
    if at < 0 or end < 0:
        return None
    try:
        first = json.loads(head[:at].rstrip().removesuffix(",") + "}")
        last = json.loads("{" + tail[end:])
        if last["schema_version"] != SCHEMA_VERSION:
            return None
        return Summary(
            **{name: first[name] for name in ("trial_id", "experiment", "cell", "code")},
            status=str(Outcome(status=first["outcome"]["status"]).status),
            message=str(first["outcome"]["message"]),
            started_at=str(last["started_at"]),
            duration_s=float(last["duration_s"]),
        )
    except (ValueError, KeyError, TypeError):
        return None


def to_json(record: TrialRecord | Measurement) -> str:
    """Standard JSON: a number that is not finite is written as a string (`"nan"`, `"inf"`, `"-inf"`)."""
    return json.dumps(_finite(asdict(record)), indent=1, allow_nan=False)


def from_json(text: str, *, as_trained: bool = False) -> TrialRecord:
    """Read a record of this or an older schema.

    Args:
        as_trained: leave out curves, and what was measured under other settings than the trained ones; both
            are most of a record.

    Raises:
        RecordError: torn JSON, something else than a record, or a newer schema.
    """
    data = _parse(_without_series(text) if as_trained else text)
    version = data.get("schema_version")
    if not isinstance(version, int) or "trial_id" not in data:
        raise RecordError("not a trial record (no schema_version or trial_id)")
    if version > SCHEMA_VERSION:
        raise RecordError(f"schema {version} is newer than this harness knows ({SCHEMA_VERSION})")
    try:
        data = _upgraded(data, version=version)
        if as_trained:
            data["samples"] = [sample for sample in data.get("samples", ()) if not sample.get("at")]
            data["series"] = {}
        return TrialRecord(**{**data, **_parts(data)})
    except RecordError:
        raise
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RecordError(f"not a trial record of schema {version}: {error}") from error


#: What makes a record of each older schema one of the next; a new schema brings the step from the one before.
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def _upgraded(data: dict[str, Any], *, version: int) -> dict[str, Any]:
    """The record as this schema has it, step by step."""
    while version < SCHEMA_VERSION:
        if version not in UPGRADES:
            raise RecordError(
                f"schema {version} is older than this harness reads; use the version that wrote it"
            )
        data = UPGRADES[version](data)
        version += 1
    return {**data, "schema_version": SCHEMA_VERSION}


def measurement_from_json(text: str) -> Measurement:
    """Read what a worker wrote.

    Raises:
        RecordError: the worker did not write a measurement.
    """
    data = _parse(text)
    try:
        return Measurement(**{**data, **_parts(data)})
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RecordError(f"the worker's answer is not a measurement: {error}") from error


def _without_series(text: str) -> str:
    """A record without its curves; as it is, should it not be laid out as `to_json` does it."""
    start = text.find(_SERIES)
    end = text.find(_THEORY, start)
    return text if start < 0 or end < 0 else text[:start] + text[end:]


def _parse(text: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise RecordError(f"not JSON ({error})") from error
    if not isinstance(data, dict):
        raise RecordError("not a JSON object")
    return data


def _parts(data: Mapping[str, Any]) -> dict[str, Any]:
    """What of parsed data is more than plain data; takes it apart."""
    outcome = dict(data["outcome"])
    outcome["stderr"] = tuple(outcome.get("stderr", ()))
    samples = tuple(
        Sample(values=tuple(map(float, sample.pop("values"))), **sample) for sample in data.get("samples", ())
    )
    series = {
        name: {column: list(map(float, values)) for column, values in columns.items()}
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
