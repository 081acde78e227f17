"""What a sweep says while it runs, read from its records and claims and so the same for any launcher."""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TextIO

from harness.claims import claim_path, read_claim
from harness.metrics import time as times
from harness.plan import STATES, Plan, PlannedTrial
from harness.protocol import PROGRESS_PREFIX
from harness.record import STATUSES, RecordError, TrialRecord
from harness.runner import log_tail
from harness.wording import counted

_POLL_S = 0.5


class Progress:
    """A thread that prints a line for each trial that ends; a context manager around the launch.

    Args:
        live: whether a last line may be overwritten with what is running (a terminal).
    """

    def __init__(self, plan: Plan, *, stream: TextIO, live: bool) -> None:
        self._study = plan.placement.study
        self._stream = stream
        self._live = live
        self._waiting = {trial.trial_id: trial for trial in plan.to_run}
        self._total = len(self._waiting)
        self._made_at = plan.made_at
        self._seen: dict[str, tuple[int, int]] = {}
        self._labels = {trial.trial_id: label(trial.cell, plan.factors) for trial in plan.trials}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._start = time.monotonic()
        self.statuses: Counter[str] = Counter()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self._clear()

    @property
    def finished(self) -> int:
        """How many trials have ended."""
        return self._total - len(self._waiting)

    @property
    def total(self) -> int:
        """How many trials the sweep runs."""
        return self._total

    @property
    def elapsed_s(self) -> float:
        """Seconds since the launch."""
        return time.monotonic() - self._start

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._look()
            if self._live:
                self._print_running()

    def _look(self) -> None:
        ended = []
        for trial_id in list(self._waiting):
            stamp = _stamp(self._study.record_path(trial_id))
            if stamp is None or stamp == self._seen.get(trial_id):
                continue
            self._seen[trial_id] = stamp
            with contextlib.suppress(RecordError):
                record = self._study.read(trial_id)
                # An older one is what this sweep is about to replace.
                if record is not None and record.started_at >= self._made_at:
                    ended.append(record)
                    del self._waiting[trial_id]
        for position, record in enumerate(sorted(ended, key=lambda record: record.started_at), 1):
            self.statuses[record.outcome.status] += 1
            self._print_ended(record, self.finished - len(ended) + position)

    def _print_ended(self, record: TrialRecord, position: int) -> None:
        width = len(str(self._total))
        parts = [f"[{position:{width}d}/{self._total}] {record.outcome.status}"]
        parts += [self._labels.get(record.trial_id, ""), *results(record), f"{record.duration_s:.1f} s"]
        left = self._total - position
        if left:
            parts.append(f"ETA {clock(self.elapsed_s / position * left)}")
        self._clear()
        self._write("  ".join(part for part in parts if part) + "\n")

    def _print_running(self) -> None:
        running = []
        for trial_id in self._waiting:
            claim = read_claim(claim_path(self._study, trial_id))
            if claim is not None:
                running.append((claim.started_at, trial_id))
        if not running:
            return
        started_at, trial_id = min(running)
        parts = [self._labels.get(trial_id, ""), last_word(self._study.log_path(trial_id))]
        parts.append(clock(time.time() - started_at))
        others = f" (+{len(running) - 1} more)" if len(running) > 1 else ""
        text = f"  {self._so_far()}running{others}: " + "  ".join(part for part in parts if part)
        columns = shutil.get_terminal_size().columns
        self._write("\r\x1b[2K" + text[: max(10, columns - 1)])

    def _so_far(self) -> str:
        """How many have ended and how, and how long the rest will take."""
        if not self.finished:
            return ""
        left = clock(self.elapsed_s / self.finished * (self._total - self.finished))
        return f"{self.finished}/{self._total} ({outcomes(self.statuses)}), ETA {left}, "

    def _clear(self) -> None:
        if self._live:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        # Nobody may be reading any more (`harness run | head`); the trials go on.
        with contextlib.suppress(OSError):
            self._stream.write(text)
            self._stream.flush()


def headline(plan: Plan, *, seconds: float | None = None) -> str:
    """What is planned, in one line, and how long it will take, where that is known."""
    counts = plan.counts()
    states = ", ".join(f"{counts[state]} {state}" for state in reversed(STATES) if counts[state])
    parts = [f"study {plan.placement.study.name}: {counted(len(plan.trials), 'trial')} ({states})"]
    if plan.duplicates:
        parts.append(f"{counted(plan.duplicates, 'duplicate')} dropped")
    parts.append(f"{len(plan.to_run)} to run")
    if seconds is not None and plan.to_run:
        parts.append(f"about {clock(seconds)}")
    return ", ".join(parts)


def outcomes(statuses: Mapping[str, int]) -> str:
    """How trials ended, in one line."""
    listed = [f"{statuses[status]} {status}" for status in STATUSES if statuses.get(status)]
    return ", ".join(listed) or "none"


def invalid_lines(plan: Plan) -> list[str]:
    """One line for each cell that cannot be run."""
    return [f"invalid  {label(trial.cell, plan.factors)}  {trial.reason}" for trial in plan.invalid]


def plan_lines(plan: Plan, *, seconds: Mapping[str, float] | None = None) -> list[str]:
    """One line for each trial: its state, what it is, what computes it, what it will cost, and why.

    Args:
        seconds: that trials are expected to take, by their ids.
    """
    shown = [(trial, label(trial.cell, plan.factors)) for trial in plan.trials]
    widest = max(len(text) for _, text in shown)
    words = max(len(trial.backend) for trial, _ in shown)
    lines = []
    for trial, text in sorted(shown, key=lambda pair: STATES.index(pair[0].state)):
        again = " (runs again)" if trial.wanted and trial.state != "new" else ""
        costs = _costs(trial, (seconds or {}).get(trial.trial_id)) if trial.wanted else ""
        parts = [f"{trial.state:7}", trial.trial_id, f"{text:{widest}}", f"{trial.backend:{words}}", costs]
        parts.append(f"{trial.reason}{again}")
        lines.append("  " + "  ".join(part for part in parts if part).rstrip())
    return lines


def _costs(trial: PlannedTrial, seconds: float | None) -> str:
    """What a trial is expected to cost: operations of a step, peak memory, time."""
    flops, peak = trial.forecast.get("flops"), trial.forecast.get("peak_alloc_bytes")
    parts = [
        "" if flops is None else f"{_short(flops, space=' ')}FLOP/step",
        "" if peak is None else f"{peak / 2**20:.4g} MiB",
        "" if seconds is None else f"~{clock(seconds)}",
    ]
    return "  ".join(part for part in parts if part)


def label(cell: Mapping[str, object], factors: Mapping[str, object]) -> str:
    """A cell as `n_hashes=4 residual=plain`: keys without their group where that is clear."""
    leaves = Counter(key.rsplit(".", 1)[-1] for key in factors)
    parts = []
    for key in factors:
        leaf = key.rsplit(".", 1)[-1]
        if key in cell:
            parts.append(f"{leaf if leaves[leaf] == 1 else key}={cell[key]}")
    return " ".join(parts)


def results(record: TrialRecord) -> list[str]:
    """The figures of a trial that fit on a line: quality, speed, memory; or why there are none."""
    if record.outcome.status != "ok":
        message = " ".join(record.outcome.message.split())
        return [message if len(message) <= 100 else f"{message[:97]}..."]
    shown = [_quality(record)]
    speed = times.columns(record).get("tokens_per_s")
    if speed is not None:
        shown.append(f"{_short(speed)} tokens/s")
    peaks = [max(s.values) for s in record.samples if s.metric == "peak_alloc_bytes" and s.values]
    if peaks:
        shown.append(f"{max(peaks) / 2**20:.4g} MiB")
    return [text for text in shown if text]


def _quality(record: TrialRecord) -> str:
    scored = record.values("scored")
    if not scored or not scored[0]:
        return ""
    nats = record.values("nll_nats")
    if record.theory.get("quality") == "bits_per_byte" and nats:
        return f"{nats[0] / scored[0] / math.log(2):.3f} bits/byte"
    correct = record.values("correct")
    return f"accuracy {correct[0] / scored[0]:.3f}" if correct else ""


def _short(number: float, *, space: str = "") -> str:
    for limit, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{space}{unit}"
    return f"{number:.3g}{space}"


def clock(seconds: float) -> str:
    """Seconds as `4:10` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def last_word(log: Path) -> str:
    """What a running trial last said about how far it is."""
    for line in reversed(log_tail(log)):
        if line.startswith(PROGRESS_PREFIX):
            return line.removeprefix(PROGRESS_PREFIX)
    return ""


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino
