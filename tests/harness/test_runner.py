"""One trial from claim to record, however it ends."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness import runner
from harness.claims import claim_path, claimed
from harness.plan import Placement
from harness.protocol import now
from harness.record import Outcome, TrialRecord
from harness.runner import Job, run_trial
from harness.server import Ending, ForkServer
from harness.store import Study

SpecOf = Callable[..., tuple[str, Mapping[str, Any]]]


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "results" / "mine")
    study.create()
    return study


@pytest.fixture
def job_of(study: Study, spec_of: SpecOf) -> Callable[..., Job]:
    def make(
        *, timeout_s: float | None = None, memory_limit_gib: float | None = None, **workload: Any
    ) -> Job:
        trial_id, spec = spec_of(**workload)
        placement = Placement(
            study=study,
            experiment="mine",
            rerun="none",
            timeout_s=timeout_s,
            memory_limit_gib=memory_limit_gib,
        )
        return Job(placement=placement, trial_id=trial_id, cell={"seed": "0"}, spec=spec, timed=False)

    return make


def outcome_of(job: Job, server: ForkServer) -> TrialRecord:
    record = run_trial(job, server=server)
    assert record is not None
    assert job.study.read(job.trial_id) == record
    assert not claim_path(job.study, job.trial_id).exists()
    return record


def test_a_good_trial_leaves_everything_a_report_needs(
    job_of: Callable[..., Job], shared_server: ForkServer
) -> None:
    before = now()
    job = job_of()
    record = outcome_of(job, shared_server)
    assert record.outcome.status == "ok"
    assert record.outcome.stderr == ()
    assert (record.experiment, record.cell, record.spec) == ("mine", {"seed": "0"}, job.spec)
    assert record.code == shared_server.code
    assert before <= record.started_at <= now()
    assert 0 < record.duration_s < 10
    assert record.values("step_s") == (0.5, 0.5)
    assert record.environment["server_id"] == shared_server.id
    assert {"torch", "python", "numpy", "threads", "cpu_model", "physical_cores", "memory_bytes"} <= set(
        record.environment
    )


@pytest.mark.parametrize(
    ("does", "status", "message", "number"),
    [
        ("raise", "error", "LookupError: the model was not there", None),
        ("exit", "error", "SystemExit: 3", None),
        ("vanish", "error", "exit code 0", None),
        ("vanish_with_code", "error", "exit code 4", None),
        ("print_garbage", "ok", "", None),
        ("kill_itself", "killed", "killed by SIGKILL", signal.SIGKILL),
        ("crash", "killed", "killed by SIGSEGV", signal.SIGSEGV),
        ("abort_for_want_of_memory", "out_of_memory", "cpu: terminate called", signal.SIGABRT),
        ("allocate_in_torch", "out_of_memory", "cpu: RuntimeError", None),
        ("allocate_in_python", "out_of_memory", "cpu: MemoryError", None),
    ],
)
def test_every_way_to_end_is_a_record(
    does: str,
    status: str,
    message: str,
    number: int | None,
    job_of: Callable[..., Job],
    shared_server: ForkServer,
) -> None:
    record = outcome_of(job_of(does=does), shared_server)
    assert record.outcome.status == status
    assert message in record.outcome.message
    assert "\n" not in record.outcome.message
    assert record.outcome.signal == number
    if status != "ok":
        assert any(line.startswith("progress: step 1/2") for line in record.outcome.stderr)


def test_a_crash_leaves_its_stack_in_the_log(job_of: Callable[..., Job], shared_server: ForkServer) -> None:
    record = outcome_of(job_of(does="crash"), shared_server)
    assert any("Segmentation fault" in line for line in record.outcome.stderr)


def test_timeout(job_of: Callable[..., Job], shared_server: ForkServer) -> None:
    record = outcome_of(job_of(seconds=30.0, timeout_s=0.4), shared_server)
    assert record.outcome.status == "timeout"
    assert record.outcome.message == "killed after timeout_s=0.4"
    assert record.outcome.rss_bytes_at_death is not None


def test_memory_limit(job_of: Callable[..., Job], shared_server: ForkServer) -> None:
    job = job_of(does="allocate_until_refused", memory_limit_gib=0.25)
    assert outcome_of(job, shared_server).outcome.status == "out_of_memory"


def test_kill_9_of_a_trial_is_a_record_with_its_signal(
    job_of: Callable[..., Job], shared_server: ForkServer
) -> None:
    job = job_of(seconds=30.0)
    killer = threading.Thread(target=_kill_when_running, args=(job,))
    killer.start()
    record = outcome_of(job, shared_server)
    killer.join()
    assert (record.outcome.status, record.outcome.signal) == ("killed", signal.SIGKILL)
    assert record.outcome.rss_bytes_at_death is not None


def _kill_when_running(job: Job) -> None:
    import psutil

    while not runner.log_tail(job.study.log_path(job.trial_id)):
        time.sleep(0.02)
    time.sleep(0.3)
    for server in psutil.Process().children():
        for trial in server.children():
            trial.kill()


def endings(monkeypatch: pytest.MonkeyPatch, *records: TrialRecord) -> list[str]:
    """Lets attempts end like these records; the list fills with how often one was made."""
    attempts: list[str] = []

    def measure(job: Job, server: ForkServer, *, timing: str) -> TrialRecord:
        attempts.append(timing)
        return records[min(len(attempts), len(records)) - 1]

    monkeypatch.setattr(runner, "_measure", measure)
    return attempts


def test_a_trial_that_somebody_killed_is_run_again_so_often(
    job_of: Callable[..., Job], shared_server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of()
    good = outcome_of(job, shared_server)
    killed = replace(good, outcome=Outcome(status="killed", signal=signal.SIGKILL))
    crashed = replace(good, outcome=Outcome(status="killed", signal=signal.SIGSEGV))
    patient = replace(job, placement=replace(job.placement, retries=2))

    attempts = endings(monkeypatch, killed, good)
    record = outcome_of(patient, shared_server)
    assert (len(attempts), record.outcome.status) == (2, "ok")
    assert record.environment["attempts"] == 2

    attempts = endings(monkeypatch, killed)
    record = outcome_of(patient, shared_server)
    assert (len(attempts), record.outcome.status, record.environment["attempts"]) == (3, "killed", 3)

    attempts = endings(monkeypatch, crashed, good)
    assert outcome_of(patient, shared_server).outcome.status == "killed"
    assert len(attempts) == 1  # it would crash again

    attempts = endings(monkeypatch, killed, good)
    assert outcome_of(job, shared_server).outcome.status == "killed"
    assert len(attempts) == 1  # retries=0


def test_timed_trials_take_turns_and_others_do_not(
    job_of: Callable[..., Job],
    shared_server: ForkServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    locked: list[str] = []

    @contextlib.contextmanager
    def lock(device: str) -> Iterator[bool]:
        locked.append(device)
        yield True

    monkeypatch.setattr(runner, "device_lock", lock)
    job = replace(job_of(), timed=True)
    shared = replace(job, placement=replace(job.placement, timing="shared"))
    assert outcome_of(job, shared_server).environment["timing"] == "exclusive"
    assert locked == ["cpu"]
    assert outcome_of(shared, shared_server).environment["timing"] == "shared"
    assert outcome_of(replace(job, timed=False), shared_server).environment["timing"] == ""
    assert locked == ["cpu"]


def test_a_server_that_is_killed_costs_one_trial(job_of: Callable[..., Job], server: ForkServer) -> None:
    record = outcome_of(job_of(does="kill_the_server"), server)
    assert (record.outcome.status, record.outcome.signal) == ("killed", signal.SIGKILL)
    assert outcome_of(job_of(), server).outcome.status == "ok"


def test_sigkill_by_the_kernel_is_out_of_memory(tmp_path: Path) -> None:
    ending = Ending(exit=None, signal=signal.SIGKILL, oom_kill=True, timed_out=False, last_rss_bytes=7)
    outcome = runner._violent_end(ending, tmp_path / "log", timeout_s=None)
    assert (outcome.status, outcome.signal, outcome.rss_bytes_at_death) == ("out_of_memory", 9, 7)
    assert outcome.message.startswith("cpu: ")


def test_a_trial_that_ended_in_time_is_not_a_timeout(tmp_path: Path) -> None:
    ending = Ending(exit=None, signal=signal.SIGSEGV, oom_kill=False, timed_out=True, last_rss_bytes=None)
    assert runner._violent_end(ending, tmp_path / "log", timeout_s=1.0).status == "killed"


def test_a_torn_measurement_is_an_error(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    out.write_text('{"outcome": ')
    ending = Ending(exit=0, signal=None, oom_kill=False, timed_out=False, last_rss_bytes=None)
    measurement = runner._measurement_after(ending, out, tmp_path / "log", timeout_s=None)
    assert measurement.outcome.status == "error"
    assert "not JSON" in measurement.outcome.message


def test_running_again_keeps_the_old_record_aside(
    job_of: Callable[..., Job], shared_server: ForkServer
) -> None:
    job = job_of()
    first, second = outcome_of(job, shared_server), outcome_of(job, shared_server)
    assert second.started_at >= first.started_at
    assert len(list((job.study.trials / "superseded").glob("*.json"))) == 1


def test_a_record_that_another_sweep_made_meanwhile_is_taken(
    job_of: Callable[..., Job], shared_server: ForkServer
) -> None:
    job = job_of()
    planned_at = now()
    first = outcome_of(job, shared_server)
    assert outcome_of(replace(job, planned_at=planned_at), shared_server) == first
    time.sleep(0.01)
    assert outcome_of(replace(job, planned_at=now()), shared_server) != first


def test_a_claimed_trial_is_left_alone(job_of: Callable[..., Job], shared_server: ForkServer) -> None:
    job = job_of()
    with claimed(job.study, job.trial_id, timeout_s=None):
        assert run_trial(job, server=shared_server) is None
    assert job.study.read(job.trial_id) is None


def test_log_tail_survives_any_bytes_and_lengths(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert runner.log_tail(log) == ()
    log.write_bytes(b"\xff\xfe\n" * 30 + b"x" * 20_000)
    tail = runner.log_tail(log, lines=3)
    assert len(tail) <= 3
    assert max(map(len, tail)) <= 500
