"""Sweeps through a real Slurm and a real Ray on this machine, as typed: records, exit codes, what is told."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.conftest import FAKE_CONF, Result, Shell, gone, harness_environment
from tests.harness.slurm import Slurm, running_slurm, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Types `harness run` with the fake workload in a process of its own.
Start = Callable[..., "subprocess.Popen[str]"]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """A Slurm of one node with two CPUs, whatever the machine has."""
    reason = why_not()
    if not _importable("hydra_plugins.hydra_submitit_launcher"):
        reason = "hydra-submitit-launcher is not installed (extra slurm)"
    if reason:
        pytest.skip(reason)
    with running_slurm(cpus=2) as one:
        yield one


@pytest.fixture(params=["slurm", "ray"])
def start(request: pytest.FixtureRequest, shell: Shell) -> Iterator[Start]:
    """Starts commands with each of the launchers; one that a test leaves behind is killed."""
    variables = harness_environment()
    if request.param == "slurm":
        variables |= request.getfixturevalue("slurm").environment
        launcher = "submitit_slurm"
    else:
        if not _importable("hydra_plugins.hydra_ray_launcher"):
            pytest.skip("hydra-ray-launcher is not installed (extra ray)")
        launcher = "ray"
        variables["RAY_USAGE_STATS_ENABLED"] = "0"
    command = [sys.executable, "-P", "-m", "harness", "run", "-cd", str(FAKE_CONF), "workload=fake", "-m"]

    started: list[subprocess.Popen[str]] = []

    def start_one(*argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*command, f"hydra/launcher={launcher}", "threads=1", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=shell.folder,
            env=variables,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


only_slurm = pytest.mark.parametrize("start", ["slurm"], indirect=True)
only_ray = pytest.mark.parametrize("start", ["ray"], indirect=True)


def end_of(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=180)
    return Result(code=process.returncode, out=out, err=err)


def wait_for_logs(shell: Shell, n: int) -> None:
    """Wait until so many trials have begun."""
    deadline = time.monotonic() + 90
    while len([path for path in (shell.study().path / "logs").glob("*.log") if path.stat().st_size]) < n:
        assert time.monotonic() < deadline, "no trial has started"
        time.sleep(0.1)


def test_every_trial_is_recorded_and_a_second_run_does_nothing(start: Start, shell: Shell) -> None:
    first = end_of(start("seed=0,1,2"))
    assert (first.code, first.err) == (0, ""), first
    assert "[3/3] ok  seed=" in first.out
    assert shell.statuses() == ["ok"] * 3
    assert {path.name for path in shell.folder.iterdir()} == {"results"}
    assert {path.name for path in (shell.folder / "results").iterdir()} == {"default"}
    written = {record.trial_id: record.started_at for record in shell.records()}
    second = end_of(start("seed=0,1,2"))
    assert (second.code, second.err) == (0, ""), second
    assert "3 done), 0 to run" in second.out
    assert {record.trial_id: record.started_at for record in shell.records()} == written


def test_a_trial_that_fails_is_told(start: Start, shell: Shell) -> None:
    result = end_of(start("attention.n_hashes=1,2", "workload.does=raise_for_two_rounds"))
    assert (result.code, result.err) == (1, ""), result
    assert shell.statuses() == ["error", "ok"]
    assert "failed: 1 trial (rerun=failed tries again" in result.out


def test_ctrl_c_ends_the_jobs(start: Start, shell: Shell) -> None:
    process = start("seed=0,1,2", "workload.seconds=60")
    wait_for_logs(shell, 1)
    time.sleep(0.5)
    pids = [_pid_of(path) for path in shell.study().trials.glob("*.claim")]
    os.killpg(process.pid, signal.SIGINT)
    result = end_of(process)
    assert result.code == 130, result
    assert result.err.splitlines()[-1] == (
        "harness: interrupted: 0 of 3 trials done; the same command does the rest"
    )
    assert pids
    deadline = time.monotonic() + 20
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@only_slurm
def test_ctrl_c_leaves_no_claim_and_no_job_in_slurm(start: Start, shell: Shell, slurm: Slurm) -> None:
    process = start("seed=0,1,2", "workload.seconds=60")
    slurm.wait_for_jobs(2, state="RUNNING")
    wait_for_logs(shell, 2)
    process.send_signal(signal.SIGINT)
    result = end_of(process)
    assert len(result.err.splitlines()) == 1, result
    assert slurm("squeue", "--noheader") == ""
    assert list(shell.study().trials.glob("*.claim")) == []


@only_slurm
def test_jobs_that_are_cancelled_are_told_and_the_rest_is_done(
    start: Start, shell: Shell, slurm: Slurm
) -> None:
    process = start("seed=0,1,2", "workload.seconds=4")
    slurm.wait_for_jobs(2, state="RUNNING")
    (pending,) = slurm.wait_for_jobs(1, state="PENDING")
    slurm("scancel", pending)
    result = end_of(process)
    assert result.code == 1, result
    assert result.err.splitlines()[-1] == (
        "harness: 1 trial could not be recorded: SlurmError: Slurm ended the job without a result "
        "(CANCELLED); the same command does the rest"
    )
    assert shell.statuses() == ["ok", "ok"]
    again = end_of(start("seed=0,1,2", "workload.seconds=4"))
    assert (again.code, again.err) == (0, ""), again
    assert "(2 done, 1 new), 1 to run" in again.out


@only_slurm
def test_a_job_that_slurm_will_never_start_is_told(start: Start, shell: Shell, slurm: Slurm) -> None:
    result = end_of(start("seed=0,1", "hydra.launcher.partition=short", "hydra.launcher.timeout_min=90"))
    assert result.code == 1, result
    assert (
        "2 trials could not be recorded: SlurmError: Slurm will not start the job (PartitionTime"
        in result.err
    )
    assert slurm("squeue", "--noheader") == ""


@only_slurm
def test_jobs_of_a_node_that_is_down_wait_and_say_so(start: Start, shell: Shell, slurm: Slurm) -> None:
    node = ("scontrol", "update", "nodename=here")
    slurm(*node, "state=down", "reason=test")
    try:
        process = start("seed=0,1")
        slurm.wait_for_jobs(2, state="PENDING")
        time.sleep(8)
        assert process.poll() is None
    finally:
        slurm(*node, "state=resume")
    result = end_of(process)
    assert result.code == 0, result
    assert result.err.startswith("harness: 2 jobs pending in Slurm: ")
    assert shell.statuses() == ["ok", "ok"]


@only_slurm
def test_what_slurm_refuses_is_one_line(start: Start, shell: Shell) -> None:
    result = end_of(start("seed=0,1", "hydra.launcher.partition=nowhere"))
    assert result.code == 1, result
    assert "the launcher failed: " in result.complaint
    assert "invalid partition specified: nowhere" in result.complaint


@only_slurm
def test_fewer_cpus_than_threads_are_told(start: Start, shell: Shell) -> None:
    result = end_of(start("hydra.launcher.cpus_per_task=1", "threads=2"))
    assert result.code == 0, result
    assert result.complaint == (
        "harness: hydra.launcher.cpus_per_task=1 for trials of 2 threads: their times say little; "
        "set threads=1"
    )


@only_ray
def test_more_cpus_than_ray_has_are_told(start: Start, shell: Shell) -> None:
    result = end_of(start("seed=0,1", "+hydra.launcher.ray.remote.num_cpus=500"))
    assert result.code == 1, result
    assert "hydra.launcher.ray.remote.num_cpus=500: Ray has " in result.complaint


def _pid_of(claim: Path) -> int:
    from harness.claims import read_claim

    found = read_claim(claim)
    assert found is not None
    return found.pid
