"""Tables from records: one row a trial, one row a sample, one row a setting and metric."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import stdtrit

from harness import metrics
from harness.comparison import implementation_name, with_ratios
from harness.design import cell_numbers, design_of, metric_columns
from harness.errors import UsageError
from harness.factors import Level, as_number, flatten, level_text
from harness.metrics.catalogue import KNOWN
from harness.metrics.names import column_name, split_column
from harness.metrics.quality import by_hash_seed
from harness.record import TrialRecord
from harness.statistics import CONFIDENCE
from harness.store import Study, Unreadable, lists_by_name

#: Columns that every table of trials has, also an empty one.
IDENTITY = (
    "trial_id", "study", "experiment", "outcome", "backend", "code", "cell", "started_at", "duration_s"
)  # fmt: skip
SAMPLE_COLUMNS = ("trial_id", "metric", "phase", "unit", "index", "value")
_SUMMARY_VALUES = ("metric", "mean", "low", "high", "sd", "n", "n_failed", "hash_seed_sd")


@dataclass(frozen=True, kw_only=True)
class Digest:
    """What the tables need of a record, which is a small part of it.

    Args:
        identity: by column, see `IDENTITY`; without the study.
        settings: the spec by dotted keys, and swept keys that are no fields of it as they were typed.
        kinds: of each sample its metric, phase, unit and how many values it has.
        values: of all samples, one after the other.
        spreads: by column, the standard deviation over hash seeds.
    """

    identity: Mapping[str, str | float]
    cell: Mapping[str, Any]
    settings: Mapping[str, Level]
    metrics: Mapping[str, float]
    kinds: tuple[tuple[str, str | None, str, int], ...]
    values: NDArray[np.float64]
    spreads: Mapping[str, float]


def digest(record: TrialRecord) -> Digest:
    """Everything that a table shows of a record."""
    return Digest(
        identity={name: _identity(record, name) for name in IDENTITY if name != "study"},
        cell=record.cell,
        settings=_settings(record),
        metrics=metrics.columns(record),
        kinds=tuple(
            (column_name(sample.metric, at=sample.at), sample.phase, sample.unit, len(sample.values))
            for sample in record.samples
        ),
        values=np.fromiter(itertools.chain.from_iterable(s.values for s in record.samples), dtype=float),
        spreads={column: _standard_deviation(found) for column, found in by_hash_seed(record).items()},
    )


def load(study_path: Path) -> pd.DataFrame:
    """The trials of a study, one row each: identity, settings, metrics.

    Files that are no records are left out with a warning.

    Raises:
        UsageError: there is no study at that path.
    """
    study = Study(Path(study_path))
    if not study.trials.is_dir():
        raise UsageError(f"no study at {study.path} (it has no folder trials/)")
    digests, unreadable = [], []
    for found in study.each():
        if isinstance(found, Unreadable):
            unreadable.append(found)
        else:
            digests.append(digest(found))
    if unreadable:
        warnings.warn(_left_out(unreadable), stacklevel=2)
    return table(by_age(digests), study=study.name, factors=typed_levels(study.read_info()))


def by_age(digests: Iterable[Digest]) -> list[Digest]:
    """Digests in the order in which a study lists its records."""
    return sorted(
        digests, key=lambda found: (str(found.identity["started_at"]), str(found.identity["trial_id"]))
    )


def typed_levels(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Swept keys and their levels as typed, from the content of `study.json`; empty if that is damaged."""
    return lists_by_name(info.get("factors"))


def table(
    records: Iterable[TrialRecord | Digest], *, study: str, factors: Iterable[str] = ()
) -> pd.DataFrame:
    """One row a record: identity, settings (swept ones first), metrics.

    Args:
        factors: swept keys in the order they were typed; those found in the cells follow.
    """
    found = _digests(records)
    swept = dict.fromkeys([*factors, *(key for one in found for key in one.cell)])
    if "implementation" in swept:
        found = [replace(one, settings=_with_implementation(one.settings)) for one in found]
    known = dict.fromkeys(key for one in found for key in one.settings)
    names = list(dict.fromkeys([*(key for key in swept if key in known), *known]))
    columns: dict[str, pd.Series[Any]] = {}
    for name in IDENTITY:
        values = [study if name == "study" else one.identity[name] for one in found]
        columns[name] = pd.Series(values, dtype=float if name == "duration_s" else "str")
    for name in names:
        columns[name] = _typed([one.settings.get(name) for one in found])
    for name in _metric_order([one.metrics for one in found]):
        # A setting and a metric of one name would hide each other.
        key = name if name not in columns else f"{name}.measured"
        columns[key] = pd.Series([one.metrics.get(name, np.nan) for one in found], dtype=float)
    frame = pd.DataFrame(columns)
    frame.attrs["settings"] = names
    return with_ratios(frame)


def samples(records: Iterable[TrialRecord | Digest]) -> pd.DataFrame:
    """One row a raw value; the evaluation setting is part of the metric's name."""
    found = _digests(records)
    # Thousands of trials are sampled in the same few ways.
    ways = {kinds: _Way.of(kinds) for kinds in dict.fromkeys(one.kinds for one in found)}
    ids = [one.identity["trial_id"] for one in found]
    columns: dict[str, pd.Series[Any]] = {
        "trial_id": _words(ids, [np.full(len(one.values), place) for place, one in enumerate(found)])
    }
    for place, name in enumerate(("metric", "phase", "unit")):
        words = list(dict.fromkeys(kind[place] for kinds in ways for kind in kinds))
        numbers = {word: number for number, word in enumerate(words)}
        coded = {kinds: way.coded(place, numbers) for kinds, way in ways.items()}
        columns[name] = _words(words, [coded[one.kinds] for one in found])
    columns["index"] = _joined([ways[one.kinds].index for one in found], kind=np.int64)
    columns["value"] = _joined([one.values for one in found], kind=np.float64)
    return pd.DataFrame(columns)


@dataclass(frozen=True, kw_only=True)
class _Way:
    """How a trial was sampled.

    Args:
        index: of each value, its place within its sample.
    """

    kinds: Sequence[tuple[str, str | None, str, int]]
    counts: list[int]
    index: NDArray[np.int64]

    @classmethod
    def of(cls, kinds: Sequence[tuple[str, str | None, str, int]]) -> _Way:
        counts = [count for *_, count in kinds]
        index = np.concatenate([np.empty(0, dtype=np.int64), *map(np.arange, counts)])
        return cls(kinds=kinds, counts=counts, index=index)

    def coded(self, place: int, numbers: Mapping[Any, int]) -> NDArray[np.int64]:
        """Of each value, the number of the word at that place of its kind."""
        return np.repeat(np.array([numbers[kind[place]] for kind in self.kinds], dtype=np.int64), self.counts)


def _words(words: Sequence[Any], codes: Sequence[NDArray[np.int64]]) -> pd.Series[Any]:
    """A column of texts from the number of each."""
    texts = pd.Series(list(words), dtype="str")
    return texts.take(_joined(codes, kind=np.int64).to_numpy()).reset_index(drop=True)


def _joined(parts: Sequence[NDArray[Any]], *, kind: type) -> pd.Series[Any]:
    return pd.Series(np.concatenate([np.empty(0, dtype=kind), *parts]))


def _digests(records: Iterable[TrialRecord | Digest]) -> list[Digest]:
    return [record if isinstance(record, Digest) else digest(record) for record in records]


def summary(
    trials: pd.DataFrame,
    *,
    records: Iterable[TrialRecord | Digest] = (),
    factors: Mapping[str, Sequence[str]] | None = None,
) -> pd.DataFrame:
    """Mean, interval and n of each metric over the seeds and repeats of each setting.

    Args:
        records: the records of the same trials; with them, `hash_seed_sd` is the mean standard deviation
            over hash seeds within a trial.
        factors: swept keys and levels as typed.
    """
    design = design_of(trials, factors=factors)
    keys = ["task", *(name for name in design.cell_keys if name != "task")]
    keys = [name for name in keys if name in trials.columns]
    names = metric_columns(trials)
    if trials.empty or not names:
        return pd.DataFrame(columns=[*keys, *_SUMMARY_VALUES])
    group = cell_numbers(trials, keys)
    long = trials[names].assign(_group=group).melt(id_vars="_group", var_name="metric")
    long["metric"] = pd.Categorical(long["metric"], categories=names)
    stats = long.groupby(["_group", "metric"], observed=True)["value"].agg(["mean", "std", "count"])
    stats = stats[stats["count"] > 0].reset_index()
    half = stdtrit(stats["count"] - 1, 0.5 + CONFIDENCE / 2) * stats["std"] / np.sqrt(stats["count"])
    failed = (trials["outcome"] != "ok").groupby(group).sum()
    spread = _hash_seed_spread(
        records, group=dict(zip(trials["trial_id"], (int(number) for number in group), strict=True))
    )
    result = pd.DataFrame(
        {
            "metric": stats["metric"].astype("str"),
            "mean": stats["mean"],
            "low": stats["mean"] - half,
            "high": stats["mean"] + half,
            "sd": stats["std"],
            "n": stats["count"],
            "n_failed": stats["_group"].map(failed),
            "hash_seed_sd": [
                spread.get((int(cell), str(metric)), np.nan)
                for cell, metric in zip(stats["_group"], stats["metric"], strict=True)
            ],
        }
    )
    first = trials[keys].assign(_group=group).drop_duplicates("_group").set_index("_group")
    settings = first.loc[stats["_group"].to_numpy()].reset_index(drop=True)
    return pd.concat([settings, result], axis="columns")


def _settings(record: TrialRecord) -> dict[str, Level]:
    """The spec by dotted keys; a swept key that is no field (a group of presets) as it was typed."""
    flat = flatten(record.spec)
    typed = {str(key): level for key, level in flatten(record.cell).items() if key not in flat}
    return flat | typed


def _with_implementation(settings: Mapping[str, Level]) -> dict[str, Level]:
    """And the option of the group `implementation` that a trial stands for which was typed without it."""
    named = dict(settings)
    if "implementation" not in named and "workload.implementation" in named:
        name = implementation_name(str(named["workload.implementation"]), str(named.get("attention")))
        named["implementation"] = name.lower()
    return named


def _identity(record: TrialRecord, name: str) -> str | float:
    match name:
        case "outcome":
            return record.outcome.status
        case "backend":
            return str(record.environment.get("backend") or "")
        case "cell":
            return json.dumps(dict(record.cell))
        case _:
            value: str | float = getattr(record, name)
            return value


def _metric_order(measured: Sequence[Mapping[str, float]]) -> list[str]:
    names = dict.fromkeys(name for row in measured for name in row)
    main = [name for name in names if "@" not in name]
    known = [name for name in KNOWN if name in main]
    rest = [name for name in main if name not in KNOWN]
    return [*known, *rest, *sorted((name for name in names if "@" in name), key=_setting_order)]


def _setting_order(column: str) -> tuple[str, tuple[tuple[str, float, str], ...]]:
    """Evaluation settings by metric, then by number, not by the digits."""
    metric, _, at = split_column(column)
    return metric, tuple((key, as_number(value) or 0.0, value) for key, value in at.items())


def _typed(values: list[Level]) -> pd.Series[Any]:
    """A column of the narrowest type that holds all levels; mixed ones as typed."""
    present = {type(value) for value in values if value is not None}
    missing = None in values
    if not present:
        return pd.Series(values, dtype=object)
    if present == {bool}:
        return pd.Series(values, dtype="boolean" if missing else bool)
    if present == {int} and all(abs(value) < 2**63 for value in values if isinstance(value, int)):
        return pd.Series(values, dtype="Int64" if missing else "int64")
    if present <= {int, float}:
        return pd.Series(values, dtype=float)
    texts = [None if value is None else level_text(value) for value in values]
    return pd.Series(texts, dtype="str")


def _hash_seed_spread(
    records: Iterable[TrialRecord | Digest], *, group: Mapping[str, int]
) -> dict[tuple[int, str], float]:
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for one in _digests(records):
        number = group.get(str(one.identity["trial_id"]))
        if number is not None:
            for column, spread in one.spreads.items():
                found[number, column].append(spread)
    return {key: float(np.mean(spreads)) for key, spreads in found.items()}


def _standard_deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _left_out(unreadable: Sequence[Unreadable]) -> str:
    first = unreadable[0]
    more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
    return f"left out, not a record: {first.path.name}: {first.reason}{more}"
