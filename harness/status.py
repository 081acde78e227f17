"""A sweep seen from another shell: `harness status`, read from records and claims alone."""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime

from harness.arguments import parser_for
from harness.claims import read_claim
from harness.errors import EXIT_OK, UsageError
from harness.progress import clock, label, last_word, outcomes, results
from harness.record import RecordError, Summary
from harness.store import Study, open_study
from harness.wording import counted

_LAST = 5


def main(argv: Sequence[str]) -> int:
    """`harness status STUDY`."""
    parser = parser_for(
        "status",
        description="Show how far a study is: what has ended and how, what runs now and where in it, what is "
        "left and how long that will take. Works while another shell, or another machine, runs the sweep.",
        examples=("harness status quick", "harness status quick --watch 5", "harness status quick --json"),
    )
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=2.0,
        metavar="SECONDS",
        help="show it again every so many seconds (2) until nothing is left or Ctrl-C",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    arguments = parser.parse_args(argv)
    if arguments.watch is not None and not 0.1 <= arguments.watch <= 86_400:
        raise UsageError(f"--watch {arguments.watch:g}: give between 0.1 and 86400 seconds")
    study = open_study(arguments.results_dir, arguments.study)
    while True:
        status = status_of(study)
        if arguments.json:
            print(json.dumps(asdict(status)), flush=True)
        else:
            _show(_lines(status), again=arguments.watch is not None)
        if arguments.watch is None or not status.left:
            return EXIT_OK
        time.sleep(arguments.watch)


@dataclass(frozen=True, kw_only=True)
class Running:
    """A trial that is claimed by a process that lives.

    Args:
        word: what it last said about how far it is.
        seconds: since it began.
    """

    trial_id: str
    label: str
    word: str
    seconds: float
    host: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """How far a study is.

    Args:
        planned: trials of the last sweep, invalid ones included.
        outcomes: how trials ended, and how many.
        waiting: trials without a record that nobody runs.
        eta_s: seconds until all are done, by the trials that are; None if nothing tells.
        latest: the trials that ended last, each in a line.
        unreadable: files among the records that are none.
    """

    study: str
    planned: int
    outcomes: dict[str, int]
    running: list[Running]
    waiting: int
    eta_s: float | None
    latest: list[str]
    unreadable: int

    @property
    def left(self) -> int:
        """Trials that have no record yet."""
        return self.waiting + len(self.running)


def status_of(study: Study) -> Status:
    """Look at a study's records and claims."""
    info = study.read_info()
    factors = info.get("factors", {})
    records, unreadable = study.summaries()
    recorded = {record.trial_id: record for record in records}
    listed = info.get("planned")
    planned = [str(trial_id) for trial_id in listed] if isinstance(listed, list) else list(recorded)
    running = _running(study, factors, typed=info.get("overrides", {}))
    # A trial that runs again has a record, which it is about to replace.
    busy = {trial.trial_id for trial in running}
    waiting = [trial_id for trial_id in planned if trial_id not in recorded and trial_id not in busy]
    return Status(
        study=study.name,
        planned=len(planned),
        outcomes=dict(Counter(record.status for record in records if record.trial_id not in busy)),
        running=running,
        waiting=len(waiting),
        eta_s=_eta(records, running, waiting=len(waiting)),
        latest=[_told(study, record, factors) for record in sorted(records, key=_ended_at)[-_LAST:]],
        unreadable=len(unreadable),
    )


def _told(study: Study, summary: Summary, factors: dict[str, list[str]]) -> str:
    """A trial that has ended, in a line."""
    parts = [summary.status, label(summary.cell, factors)]
    with contextlib.suppress(RecordError):
        record = study.read(summary.trial_id)
        parts += [] if record is None else results(record)
    return "  ".join(part for part in parts if part)


def _running(
    study: Study, factors: dict[str, list[str]], *, typed: Mapping[str, Sequence[str]]
) -> list[Running]:
    found = []
    for path in sorted(study.trials.glob("*.claim")):
        claim, trial_id = read_claim(path), path.stem
        if claim is None or not claim.alive:
            continue
        found.append(
            Running(
                trial_id=trial_id,
                label=_label_of(typed.get(trial_id, []), factors) or trial_id,
                word=last_word(study.log_path(trial_id)),
                seconds=max(0.0, time.time() - claim.started_at),
                host=claim.host,
                pid=claim.pid,
            )
        )
    return sorted(found, key=lambda trial: -trial.seconds)


def _label_of(words: Sequence[str], factors: dict[str, list[str]]) -> str:
    """The cell of a trial that has no record, by what was typed for it."""
    return label(dict(word.lstrip("+").partition("=")[::2] for word in words), factors)


def _eta(records: Sequence[Summary], running: Sequence[Running], *, waiting: int) -> float | None:
    """By the median of what measured trials took, shared among those that run at the same time."""
    took = [record.duration_s for record in records if record.status != "invalid"]
    if not waiting and not running:
        return 0.0
    if not took:
        return None
    each = statistics.median(took)
    left = waiting * each + sum(max(0.0, each - trial.seconds) for trial in running)
    return left / max(1, len(running))


def _ended_at(record: Summary) -> float:
    try:
        return datetime.fromisoformat(record.started_at).timestamp() + record.duration_s
    except ValueError:
        return 0.0


def _lines(status: Status) -> list[str]:
    done = sum(status.outcomes.values())
    head = f"study {status.study}: {done} of {counted(max(status.planned, done), 'trial')} ended"
    if done:
        head += f" ({outcomes(status.outcomes)})"
    if status.unreadable:
        head += f", {counted(status.unreadable, 'file')} unreadable"
    lines = [head]
    for trial in status.running:
        parts = (trial.label, trial.word, clock(trial.seconds), f"(process {trial.pid} on {trial.host})")
        lines.append("  running  " + "  ".join(part for part in parts if part))
    if status.waiting and not status.running:
        lines.append(
            f"  {counted(status.waiting, 'trial')} left, and nothing runs: the same command does the rest"
        )
    elif status.left:
        eta = "" if status.eta_s is None else f", about {clock(status.eta_s)}"
        lines.append(f"  left     {status.waiting} waiting{eta}")
    if status.latest:
        lines += ["  latest", *(f"    {line}" for line in status.latest)]
    return lines


def _show(lines: Sequence[str], *, again: bool) -> None:
    if again and sys.stdout.isatty():
        sys.stdout.write("\x1b[H\x1b[2J")
    print(*lines, sep="\n", flush=True)
