"""The small commands: what is there, one record in full, and deleting a study."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from harness import progress
from harness.arguments import parser_for
from harness.claims import read_claim
from harness.errors import EXIT_FAILED, EXIT_OK, UsageError
from harness.paths import conf_dir
from harness.record import RecordError, TrialRecord
from harness.runner import log_tail
from harness.store import Study, open_study, studies
from harness.wording import counted

_LOG_LINES = 15
_PLACED_ANEW = ("study", "results_dir", "rerun")


# list


def list_main(argv: Sequence[str]) -> int:
    """`harness list [studies|experiments|tasks|families]`."""
    parser = parser_for(
        "list",
        description="List what is there.",
        examples=("harness list", "harness list experiments", "harness list --results-dir /somewhere"),
    )
    parser.add_argument("what", nargs="?", default="studies", choices=list(_LISTS))
    arguments = parser.parse_args(argv)
    lines = _LISTS[arguments.what](arguments.results_dir)
    print(*lines, sep="\n")
    return EXIT_OK


def _list_studies(results_dir: Path) -> list[str]:
    rows = [_study_row(study) for study in studies(results_dir)]
    if not rows:
        return [f"no studies in {results_dir}; 'harness run experiment=quick' makes one"]
    return _columns([("study", "trials", "outcomes", "experiment", "last"), *rows])


def _study_row(study: Study) -> tuple[str, ...]:
    records, unreadable = study.summaries()
    statuses = Counter(record.status for record in records)
    ended = progress.outcomes(statuses)
    if unreadable:
        ended += f", {len(unreadable)} unreadable"
    experiments = ", ".join(sorted({record.experiment for record in records}))
    last = records[-1].started_at[:16].replace("T", " ") if records else ""
    return study.name, str(len(records)), ended, experiments, last


def _list_group(group: str) -> Callable[[Path], list[str]]:
    def lines(_: Path) -> list[str]:
        files = sorted((conf_dir() / group).glob("*.yaml"))
        return _columns([(path.stem, _summary(path)) for path in files]) or [f"no {group} in {conf_dir()}"]

    return lines


def _summary(path: Path) -> str:
    """What a config file says it is: the first sentence of its first comment."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if not line.startswith("#") or not text:
            if words or line.strip():
                break
        elif not text.startswith("@package"):
            words.append(text)
    sentence, end, _ = " ".join(words).partition(". ")
    return sentence + end.strip()


_LISTS: Mapping[str, Callable[[Path], list[str]]] = {
    "studies": _list_studies,
    "experiments": _list_group("experiment"),
    "tasks": _list_group("task"),
    "families": _list_group("hashing"),
}


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = ([f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows)
    return ["  ".join(row).rstrip() for row in padded]


# show


def show_main(argv: Sequence[str]) -> int:
    """`harness show TRIAL`."""
    parser = parser_for(
        "show",
        description="Show one record: cell, outcome, figures, end of its log, the command that repeats it.",
        examples=(
            "harness show 3f9c0a1b2c4d",
            "harness show 3f9c --study mine",
            "harness show 3f9c --json | jq .spec",
        ),
    )
    parser.add_argument("trial", metavar="TRIAL", help="its id, or the beginning of it")
    parser.add_argument("--study", help="look only in this study")
    parser.add_argument("--json", action="store_true", help="print the record as it is stored")
    arguments = parser.parse_args(argv)
    study, trial_id = _find_trial(arguments.trial, arguments.results_dir, arguments.study)
    path = study.record_path(trial_id)
    if arguments.json:
        try:
            print(path.read_text(encoding="utf-8", errors="replace"), end="")
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        return EXIT_OK
    try:
        record = study.read(trial_id)
    except RecordError as error:
        raise UsageError(f"{path} cannot be read: {error}; delete it to run the trial again") from error
    if record is None:
        raise UsageError(f"{path} is gone")
    print(*_shown(study, record), sep="\n")
    return EXIT_OK


def _find_trial(trial: str, results_dir: Path, study_name: str | None) -> tuple[Study, str]:
    places = studies(results_dir) if study_name is None else [open_study(results_dir, study_name)]
    found = [
        (study, path.stem)
        for study in places
        for path in sorted(study.trials.glob("*.json"))
        if path.stem.startswith(trial)
    ]
    if not found:
        where = f"study {study_name}" if study_name else f"any study of {results_dir}"
        raise UsageError(f"no trial {trial!r} in {where}; 'harness plan' lists the ids of a sweep")
    if len(found) > 1:
        named = ", ".join(f"{trial_id} (study {study.name})" for study, trial_id in found[:4])
        raise UsageError(f"{trial!r} begins {len(found)} trials: {named}; give more of it, or --study")
    return found[0]


def _shown(study: Study, record: TrialRecord) -> list[str]:
    outcome, environment = record.outcome, record.environment
    figures = "  ".join(progress.results(record)) if outcome.status == "ok" else ""
    facts = {
        "trial": record.trial_id,
        "study": f"{study.name} (experiment {record.experiment})",
        "cell": " ".join(f"{key}={level}" for key, level in record.cell.items()),
        "outcome": f"{outcome.status}: {outcome.message}" if outcome.message else outcome.status,
        "at death": _memory(outcome.rss_bytes_at_death),
        "figures": figures,
        "started": f"{record.started_at}, took {record.duration_s:.1f} s",
        "code": record.code,
        "backend": str(environment.get("backend") or ""),
        "on": ", ".join(str(environment[key]) for key in ("device_name", "torch") if environment.get(key)),
        "record": str(study.record_path(record.trial_id)),
        "log": str(study.log_path(record.trial_id)),
        "repeat": _repeating_command(study, record),
    }
    lines = [f"{name:8} {value}" for name, value in facts.items() if value]
    if outcome.traceback:
        lines += ["", *outcome.traceback.rstrip().splitlines()]
    tail = log_tail(study.log_path(record.trial_id), lines=_LOG_LINES)
    if tail:
        lines += ["", "the log ends:", *(f"  {line}" for line in tail)]
    return lines


def _memory(size: int | None) -> str:
    return "" if size is None else f"held {size / 2**20:.4g} MiB"


def _repeating_command(study: Study, record: TrialRecord) -> str:
    """The command that measures this trial again; empty for a record that came from elsewhere."""
    overrides = study.read_info().get("overrides", {}).get(record.trial_id)
    if overrides is None:
        return ""
    settings = [word for word in overrides if word.partition("=")[0] not in _PLACED_ANEW]
    if any(word.startswith("experiment=") for word in settings):
        # The levels that are typed hold for every product of the experiment, so that several cells remain.
        settings.append(f'hydra.sweeper.only=["{record.trial_id}"]')
    return shlex.join(
        [
            "harness",
            "run",
            *settings,
            f"study={study.name}",
            f"results_dir={study.path.parent}",
            "rerun=all",
        ]
    )


# rm


def rm_main(argv: Sequence[str]) -> int:
    """`harness rm STUDY`."""
    parser = parser_for(
        "rm",
        description="Delete a study of the results folder: its records, logs and report.",
        examples=("harness rm mine", "harness rm mine --yes"),
    )
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    arguments = parser.parse_args(argv)
    study = open_study(arguments.results_dir, arguments.study)
    if study.path.is_symlink():
        raise UsageError(
            f"{study.path} is a link to {study.path.resolve()}; delete the link or that folder yourself"
        )
    if study.path.name != arguments.study or not _is_study(study):
        raise UsageError(
            f"rm {arguments.study}: deletes studies of {arguments.results_dir} by name, and folders with "
            "records or a study.json only"
        )
    running = _running(study)
    if running:
        raise UsageError(
            f"study {study.name} is running ({counted(running, 'trial')} claimed); stop that sweep first"
        )
    if not arguments.yes and not _agreed(study):
        print("nothing deleted")
        return EXIT_FAILED
    try:
        shutil.rmtree(study.path)
    except OSError as error:
        raise UsageError(f"cannot delete {study.path}: {error.strerror}") from error
    print(f"deleted {study.path}")
    return EXIT_OK


def _is_study(study: Study) -> bool:
    """Whether somebody wrote it as one: a folder of another kind may have a `trials` in it too."""
    records, _ = study.summaries()
    return bool(records or study.read_info())


def _running(study: Study) -> int:
    claims = [read_claim(path) for path in study.trials.glob("*.claim")]
    return sum(claim is not None and claim.alive for claim in claims)


def _agreed(study: Study) -> bool:
    if not sys.stdin.isatty():
        raise UsageError(f"deleting study {study.name} needs a yes: give --yes, or run it in a terminal")
    n = len(list(study.trials.glob("*.json")))
    with contextlib.suppress(EOFError):
        return input(f"delete {study.path} with {n} records? [y/N] ").strip().lower() in ("y", "yes")
    return False
