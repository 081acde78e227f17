"""Run one trial and store its record, whatever happens to it.

The record of a trial whose process could not say anything itself is made from what is known of its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.claims import claimed
from harness.environment import host_environment
from harness.locks import device_lock
from harness.plan import Placement, Plan, PlannedTrial
from harness.protocol import OUT_OF_MEMORY, now
from harness.record import Measurement, Outcome, RecordError, TrialRecord, measurement_from_json
from harness.server import Ending, ForkServer, ServerError
from harness.store import Study

_LOG_LINES = 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """One trial to run.

    Args:
        spec: the encoded spec; its id is `trial_id`.
        planned_at: when the sweep was planned (ISO 8601, UTC): a record that is younger was made by
            another sweep in the meantime, and is as good as ours.
        backend: what will compute the attention, as far as it is known before.
        timed: whether times are among what it measures.
    """

    placement: Placement
    trial_id: str
    cell: Mapping[str, Any]
    spec: Mapping[str, Any]
    planned_at: str = ""
    backend: str = ""
    timed: bool = True

    @property
    def study(self) -> Study:
        return self.placement.study


def run_trial(job: Job, *, server: ForkServer) -> TrialRecord | None:
    """Measure one trial and store its record; None if another process is at it.

    Raises:
        OSError: the record could not be written.
    """
    # The lock first: a claim would grow old while it waits.
    with (
        _alone_on_its_device(job) as timing,
        claimed(job.study, job.trial_id, timeout_s=job.placement.timeout_s) as mine,
    ):
        if not mine:
            return None
        record = _made_meanwhile(job)
        if record is None:
            record = _measure(job, server, timing=timing)
            for attempt in range(job.placement.retries):
                if not _killed_from_outside(record):
                    break
                record = _measure(job, server, timing=timing)
                record = replace(record, environment={**record.environment, "attempts": attempt + 2})
            job.study.write(record)
        return record


@contextlib.contextmanager
def _alone_on_its_device(job: Job) -> Iterator[str]:
    """Wait for the turn of a trial whose times count; how its times are to be understood."""
    if not job.timed:
        yield ""
    elif job.placement.timing == "shared":
        yield "shared"
    else:
        with device_lock(str(job.spec.get("device", "cpu"))) as held:
            yield "exclusive" if held else "unlocked"


def _killed_from_outside(record: TrialRecord) -> bool:
    """Whether somebody ended it who had nothing to do with it: a crash would come again."""
    outcome = record.outcome
    return outcome.status == "killed" and outcome.signal in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP)


def record_failure(job: Job, message: str, *, code: str) -> TrialRecord:
    """Store that a trial could not even be started."""
    record = TrialRecord(
        trial_id=job.trial_id,
        experiment=job.placement.experiment,
        cell=job.cell,
        code=code,
        spec=job.spec,
        outcome=Outcome(status="error", message=message),
        environment=host_environment(),
        started_at=now(),
    )
    job.study.write(record)
    return record


def record_invalid(plan: Plan, trial: PlannedTrial) -> None:
    """Store that a cell of a sweep cannot be run, unless that is known already."""
    with contextlib.suppress(RecordError):
        known = plan.placement.study.read(trial.trial_id)
        if known is not None and known.code == plan.code and known.outcome.message == trial.reason:
            return
    record = TrialRecord(
        trial_id=trial.trial_id,
        experiment=plan.placement.experiment,
        cell=trial.cell,
        code=plan.code,
        spec=trial.spec,
        outcome=Outcome(status="invalid", message=trial.reason),
        environment=host_environment(),
        started_at=now(),
    )
    plan.placement.study.write(record)


def forget_invalid(plan: Plan) -> None:
    """Delete the records, which hold no measurement, of cells that were invalid and have become valid."""
    earlier = plan.placement.study.read_info().get("overrides", {})
    valid = {trial.overrides for trial in plan.trials if trial.state != "invalid"}
    planned = {trial.trial_id for trial in plan.trials}
    for trial_id, overrides in earlier.items():
        if trial_id not in planned and tuple(overrides) in valid:
            with contextlib.suppress(RecordError):
                record = plan.placement.study.read(trial_id)
                if record is not None and record.outcome.status == "invalid":
                    plan.placement.study.record_path(trial_id).unlink(missing_ok=True)


def _made_meanwhile(job: Job) -> TrialRecord | None:
    if not job.planned_at:
        return None
    with contextlib.suppress(RecordError):
        record = job.study.read(job.trial_id)
        if record is not None and record.started_at >= job.planned_at:
            return record
    return None


def _measure(job: Job, server: ForkServer, *, timing: str) -> TrialRecord:
    started_at, start = now(), time.monotonic()
    out = server.scratch() / f"{job.trial_id}.measurement.json"
    log = job.study.log_path(job.trial_id)
    out.unlink(missing_ok=True)
    log.unlink(missing_ok=True)
    try:
        ending = server.run(
            job.spec,
            out=out,
            log=log,
            timeout_s=job.placement.timeout_s,
            memory_limit_gib=job.placement.memory_limit_gib,
            weights=job.study.weights_path(job.trial_id),
        )
        measurement = _measurement_after(ending, out, log, timeout_s=job.placement.timeout_s)
    except ServerError as error:
        status = "error" if error.signal is None else "killed"
        outcome = Outcome(status=status, message=str(error), signal=error.signal, stderr=log_tail(log))
        measurement = Measurement(outcome=outcome)
    return TrialRecord(
        trial_id=job.trial_id,
        experiment=job.placement.experiment,
        cell=job.cell,
        code=server.code,
        spec=job.spec,
        outcome=measurement.outcome,
        environment={
            **host_environment(),
            # A trial that was killed has not told it.
            "backend": job.backend,
            **measurement.environment,
            "timing": timing,
            "server_id": server.id,
        },
        samples=measurement.samples,
        series=measurement.series,
        theory=measurement.theory,
        started_at=started_at,
        duration_s=round(time.monotonic() - start, 3),
    )


def _measurement_after(ending: Ending, out: Path, log: Path, *, timeout_s: float | None) -> Measurement:
    """What the child measured, or how it ended without."""
    if ending.exit == 0:
        try:
            measurement = measurement_from_json(out.read_text(encoding="utf-8"))
        except FileNotFoundError:
            outcome = Outcome(status="error", message="the trial left (exit code 0) without a measurement")
        except (OSError, RecordError) as error:
            outcome = Outcome(status="error", message=str(error))
        else:
            if measurement.outcome.status == "ok":
                return measurement
            return replace(measurement, outcome=replace(measurement.outcome, stderr=log_tail(log)))
    else:
        outcome = _violent_end(ending, log, timeout_s=timeout_s)
    return Measurement(outcome=replace(outcome, stderr=log_tail(log)))


def _violent_end(ending: Ending, log: Path, *, timeout_s: float | None) -> Outcome:
    """The outcome of a child that could not say anything itself."""
    last = ending.last_rss_bytes
    if ending.timed_out and ending.signal == signal.SIGKILL:
        message = f"killed after timeout_s={timeout_s:g}"
        return Outcome(status="timeout", message=message, rss_bytes_at_death=last)
    if ending.oom_kill and ending.signal == signal.SIGKILL:
        message = "cpu: killed by the kernel, which had no memory left"
        return Outcome(status="out_of_memory", message=message, signal=ending.signal, rss_bytes_at_death=last)
    words = next((line for line in reversed(log_tail(log)) if OUT_OF_MEMORY.search(line)), None)
    if words is not None and ending.signal != signal.SIGKILL:
        return Outcome(
            status="out_of_memory",
            message=f"cpu: {words.strip()}",
            signal=ending.signal,
            rss_bytes_at_death=last,
        )
    if ending.signal is None:
        return Outcome(
            status="error", message=f"the trial left (exit code {ending.exit}) without a measurement"
        )
    name = signal.Signals(ending.signal).name
    return Outcome(
        status="killed", message=f"killed by {name}", signal=ending.signal, rss_bytes_at_death=last
    )


def log_tail(log: Path, *, lines: int = _LOG_LINES) -> tuple[str, ...]:
    """The last lines that a trial printed, whatever bytes they are."""
    try:
        with log.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - 16_384))
            text = stream.read().decode("utf-8", errors="replace")
    except OSError:
        return ()
    return tuple(line[:500] for line in text.splitlines()[-lines:])
