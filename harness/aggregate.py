"""Tables from records: one row a trial, one row a sample, one row a setting and metric."""

from __future__ import annotations

import json
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
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


def load(study_path: Path) -> pd.DataFrame:
    """The trials of a study, one row each: identity, settings, metrics.

    Files that are no records are left out with a warning.

    Raises:
        UsageError: there is no study at that path.
    """
    study = Study(Path(study_path))
    if not study.trials.is_dir():
        raise UsageError(f"no study at {study.path} (it has no folder trials/)")
    records, unreadable = study.scan()
    if unreadable:
        warnings.warn(_left_out(unreadable), stacklevel=2)
    return table(records, study=study.name, factors=typed_levels(study.read_info()))


def typed_levels(info: Mapping[str, Any]) -> dict[str, list[str]]:
    """Swept keys and their levels as typed, from the content of `study.json`; empty if that is damaged."""
    return lists_by_name(info.get("factors"))


def table(records: Iterable[TrialRecord], *, study: str, factors: Iterable[str] = ()) -> pd.DataFrame:
    """One row a record: identity, settings (swept ones first), metrics.

    Args:
        factors: swept keys in the order they were typed; those found in the cells follow.
    """
    found = list(records)
    settings = [_settings(record) for record in found]
    measured = [metrics.columns(record) for record in found]
    swept = dict.fromkeys([*factors, *(key for record in found for key in record.cell)])
    if "implementation" in swept:
        _name_implementations(settings)
    names = [key for key in swept if any(key in row for row in settings)]
    names = list(dict.fromkeys([*names, *(key for row in settings for key in row)]))
    values = _metric_order(measured)
    columns: dict[str, pd.Series[Any]] = {}
    for name in IDENTITY:
        columns[name] = pd.Series([_identity(record, name, study=study) for record in found])
    columns["duration_s"] = columns["duration_s"].astype(float)
    for name in names:
        columns[name] = _typed([row.get(name) for row in settings])
    for name in values:
        # A setting and a metric of one name would hide each other.
        key = name if name not in columns else f"{name}.measured"
        columns[key] = pd.Series([row.get(name, np.nan) for row in measured], dtype=float)
    frame = pd.DataFrame(columns)
    frame = frame.astype({name: "str" for name in IDENTITY if name != "duration_s"})
    frame.attrs["settings"] = names
    return with_ratios(frame)


def samples(records: Iterable[TrialRecord]) -> pd.DataFrame:
    """One row a raw value; the evaluation setting is part of the metric's name."""
    parts: dict[str, list[Any]] = {name: [] for name in SAMPLE_COLUMNS}
    for record in records:
        for sample in record.samples:
            count = len(sample.values)
            parts["trial_id"] += [record.trial_id] * count
            parts["metric"] += [column_name(sample.metric, at=sample.at)] * count
            parts["phase"] += [sample.phase] * count
            parts["unit"] += [sample.unit] * count
            parts["index"] += range(count)
            parts["value"] += sample.values
    frame = pd.DataFrame(parts)
    return frame.astype(
        {"trial_id": "str", "metric": "str", "phase": "str", "unit": "str", "index": int, "value": float}
    )


def summary(
    trials: pd.DataFrame,
    *,
    records: Iterable[TrialRecord] = (),
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


def _name_implementations(settings: Sequence[dict[str, Level]]) -> None:
    """The option of the group `implementation` that a trial stands for which was typed without it."""
    for row in settings:
        if "implementation" not in row and "workload.implementation" in row:
            name = implementation_name(str(row["workload.implementation"]), str(row.get("attention")))
            row["implementation"] = name.lower()


def _identity(record: TrialRecord, name: str, *, study: str) -> str | float:
    match name:
        case "study":
            return study
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
    records: Iterable[TrialRecord], *, group: Mapping[str, int]
) -> dict[tuple[int, str], float]:
    found: dict[tuple[int, str], list[float]] = defaultdict(list)
    for record in records:
        for column, values in by_hash_seed(record).items():
            if record.trial_id in group:
                found[group[record.trial_id], column].append(float(np.std(values, ddof=1)))
    return {key: float(np.mean(spreads)) for key, spreads in found.items()}


def _left_out(unreadable: Sequence[Unreadable]) -> str:
    first = unreadable[0]
    more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
    return f"left out, not a record: {first.path.name}: {first.reason}{more}"
