"""Baselines: one side of a comparison in a small sorted file that one can commit and review."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import store
from harness.arguments import Parser, parser_for
from harness.errors import EXIT_MISSING, EXIT_OK, HarnessError, UsageError
from harness.gates.side import Trial, cells, trial_of
from harness.metrics.catalogue import describe
from harness.metrics.names import is_percentile
from harness.record import FAILED_STATUSES

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


class BaselineRefused(HarnessError):
    """A study that no baseline can be made of."""

    exit_code = EXIT_MISSING


@dataclass(frozen=True, kw_only=True)
class Side:
    """The trials of a study or a baseline.

    Args:
        name: what the user called it.
        unreadable: files among the records that are none, in words.
        n_older: records left out as a newer one is of the same cell and seed.
    """

    name: str
    trials: tuple[Trial, ...]
    unreadable: tuple[str, ...] = ()
    n_older: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """`harness baseline save STUDY --as NAME`."""
    try:
        options = _parser().parse_args(argv)
        study = store.open_study(options.results_dir, options.study)
        path = save_baseline(study, name=options.name, results_dir=options.results_dir)
    except HarnessError as error:
        print(f"harness baseline: {error}", file=sys.stderr)
        return error.exit_code
    print(path)
    return EXIT_OK


def _parser() -> Parser:
    parser = parser_for(
        "baseline",
        description="Keep a study's numbers to compare with, in baselines/NAME.json.",
        examples=("harness baseline save ci --as ci",),
    )
    parser.add_argument("action", choices=["save"], help="make a baseline of a study")
    parser.add_argument("study", help="name of the study, or its folder")
    parser.add_argument("--as", dest="name", required=True, metavar="NAME", help="name of the baseline")
    return parser


def save_baseline(study: store.Study, *, name: str, results_dir: Path) -> Path:
    """Write `baselines/NAME.json`.

    Raises:
        UsageError: no such name, or the file cannot be written.
        BaselineRefused: the study is empty, or trials of it failed: a gate must not call that normal.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:60]!r} is no name of a baseline: use letters, digits, '.', '_', '+', '-'")
    side = side_of_study(study)
    failed = [trial for trial in side.trials if trial.outcome in FAILED_STATUSES]
    if side.unreadable:
        raise BaselineRefused(f"study {study.name} holds a file that is no record: {side.unreadable[0]}")
    if failed or not side.trials:
        why = f"{len(failed)} of its trials failed" if failed else "it has no trials"
        raise BaselineRefused(f"study {study.name} makes no baseline: {why}; run it again first")
    path = results_dir / "baselines" / f"{name}.json"
    try:
        store.write_atomically(path, to_json(side.trials, name=name, study=study.path.resolve().name))
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def side_of_study(study: store.Study) -> Side:
    """The trials of a study; of several records of one cell and seed, the one last planned or measured."""
    planned = study.read_info().get("planned")
    wanted = {str(entry) for entry in planned} if isinstance(planned, list) else set()
    dated, unreadable = [], []
    # A gate judges trials as they were trained: the rest, which is most of a record, is not even decoded.
    for found in study.each(as_trained=True):
        if isinstance(found, store.Unreadable):
            unreadable.append(f"{found.path.name}: {found.reason}")
        else:
            rank = (found.trial_id in wanted, found.started_at, found.trial_id)
            dated.append((rank, trial_of(found)))
    latest = {(trial.key, trial.replicate): trial for _, trial in sorted(dated, key=lambda entry: entry[0])}
    return Side(
        name=study.name,
        trials=tuple(latest.values()),
        unreadable=tuple(unreadable),
        n_older=len(dated) - len(latest),
    )


def open_side(results_dir: Path, name: str) -> Side:
    """A baseline of that name, else a study of that name; also the path of either.

    Raises:
        UsageError: there is neither, or the baseline cannot be read.
    """
    path = Path(name) if name.endswith(".json") else results_dir / "baselines" / f"{name}.json"
    if path.is_file():
        return Side(name=name, trials=tuple(read_baseline(path)))
    if name.endswith(".json"):
        raise UsageError(f"no baseline {name}: there is no such file")
    try:
        return side_of_study(store.open_study(results_dir, name))
    except UsageError as error:
        saved = (
            ", ".join(sorted(entry.stem for entry in (results_dir / "baselines").glob("*.json"))) or "none"
        )
        raise UsageError(f"{error}; baselines: {saved}") from error


def to_json(trials: Iterable[Trial], *, name: str, study: str) -> str:
    """A baseline as text: sorted, each value once, one line a trial's metrics."""
    found = list(trials)
    settings = _common([trial.settings for trial in found])
    fingerprint = _common([trial.fingerprint for trial in found])
    data = {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "study": study,
        "code": sorted({trial.code for trial in found}),
        "fingerprint": fingerprint,
        "settings": settings,
        "cells": [
            {
                "experiment": group[0].experiment,
                "cell": group[0].cell,
                "quality": group[0].quality,
                "settings": _without(group[0].settings, settings),
                "trials": {
                    trial.replicate: {
                        "outcome": trial.outcome,
                        "code": trial.code,
                        "fingerprint": _without(trial.fingerprint, fingerprint),
                        "scored": trial.scored,
                        "metrics": _kept(trial.metrics),
                    }
                    for trial in group
                },
            }
            for _, group in sorted(cells(found).items())
        ],
    }
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def read_baseline(path: Path) -> list[Trial]:
    """The trials behind a baseline.

    Raises:
        UsageError: the file is torn, something else, or of a newer version.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["schema_version"]
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{path}: baseline schema {version!r} is not what this harness knows ({SCHEMA_VERSION})"
            )
        return [
            _trial(cell, replicate=str(replicate), entry=entry, whole=data)
            for cell in data["cells"]
            for replicate, entry in cell["trials"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path}: not a baseline ({' '.join(str(error).split()) or type(error).__name__})"
        ) from error


def _trial(
    cell: Mapping[str, Any], *, replicate: str, entry: Mapping[str, Any], whole: Mapping[str, Any]
) -> Trial:
    return Trial(
        experiment=str(cell["experiment"]),
        cell={str(key): str(level) for key, level in cell["cell"].items()},
        replicate=replicate,
        outcome=str(entry["outcome"]),
        code=str(entry["code"]),
        quality=str(cell["quality"]),
        metrics={str(name): float(value) for name, value in entry["metrics"].items()},
        scored=float(entry["scored"]),
        fingerprint={**whole["fingerprint"], **entry["fingerprint"]},
        settings={**whole["settings"], **cell["settings"]},
    )


def _kept(metrics: Mapping[str, float]) -> dict[str, float]:
    """Outcomes without percentiles; times to a millionth, as more digits are noise that a diff shows."""
    kept = {}
    for name, value in metrics.items():
        metric = describe(name)
        if metric.scale and not is_percentile(name) and value == value and abs(value) != float("inf"):
            kept[name] = round(value, 6) if metric.unit == "s" else value
    return kept


def _common(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = found[0]
    return {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in found)
    }


def _without(values: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in common}
