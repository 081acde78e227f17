"""The same sweep through launchers that go beyond this process: a real Slurm, a real Ray, submitit's own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from harness.store import Study
from tests.harness.conftest import FAKE_CONF, harness_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo")
LEVELS = "attention.n_hashes=1,2,4"


def needs(module: str) -> None:
    """Skip where a launcher's plugin is not installed."""
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")


def run(folder: Path, *words: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Type `harness run` with the fake workload in that folder."""
    command = [sys.executable, "-m", "harness", "run", "-cd", str(FAKE_CONF), "workload=fake", *words]
    return subprocess.run(
        command, cwd=folder, env={**harness_environment(), **environment}, capture_output=True, text=True
    )


def sweep_three_times(folder: Path, *launcher: str, environment: Mapping[str, str]) -> None:
    """All trials are measured, none again, and one that fails is a record and an exit code."""
    study = Study(folder / "results" / "mine")
    done = run(folder, "-m", LEVELS, "threads=1", "study=mine", *launcher, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 trials" in done.stdout
    records, unreadable = study.scan()
    assert unreadable == []
    assert sorted(record.cell["attention.n_hashes"] for record in records) == ["1", "2", "4"]
    assert {record.outcome.status for record in records} == {"ok"}

    again = run(folder, "-m", LEVELS, "threads=1", "study=mine", *launcher, environment=environment)
    assert again.returncode == 0
    assert "3 trials (3 done), 0 to run" in again.stdout
    assert study.scan()[0] == records

    failing = ("-m", LEVELS, "threads=1", "study=failing", "workload.does=raise_for_two_rounds", *launcher)
    failed = run(folder, *failing, environment=environment)
    assert failed.returncode == 1
    assert "failed: 1 trial" in failed.stdout
    statuses = [record.outcome.status for record in Study(folder / "results" / "failing").scan()[0]]
    assert sorted(statuses) == ["error", "ok", "ok"]
    assert {path.name for path in folder.iterdir()} == {"results"}


def test_submitit_runs_jobs_of_this_machine(tmp_path: Path) -> None:
    needs("hydra_plugins.hydra_submitit_launcher")
    sweep_three_times(tmp_path, "hydra/launcher=submitit_local", environment={})


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, str]]:
    """A Slurm of one node, this machine, on loopback; the environment that its commands need."""
    needs("hydra_plugins.hydra_submitit_launcher")
    missing = [name for name in DAEMONS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm, munge)")
    if os.geteuid() != 0:
        pytest.skip("its daemons want to be started by root")
    # Outside of pytest's folders, which no other user may enter.
    folder = Path("/tmp") / f"harness-slurm-{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        config = _configure(folder)
        environment = {"SLURM_CONF": str(config)}
        stack.enter_context(_daemon(_munged(folder), user="munge", log=folder / "munged.out"))
        _wait_until(lambda: (folder / "munge" / "socket").exists(), "munged has no socket")
        for name in ("slurmctld", "slurmd"):
            command = [str(shutil.which(name)), "-D", "-f", str(config)]
            stack.enter_context(_daemon(command, log=folder / f"{name}.out", environment=environment))
        _wait_until(lambda: _idle(environment), "no idle node", logs=folder)
        yield environment


def test_a_real_slurm(tmp_path: Path, slurm: Mapping[str, str]) -> None:
    sweep_three_times(
        tmp_path,
        "hydra/launcher=submitit_slurm",
        "hydra.launcher.partition=all",
        "hydra.launcher.cpus_per_task=1",
        "hydra.launcher.timeout_min=5",
        environment=slurm,
    )


def test_a_job_that_slurm_refuses_is_one_line(tmp_path: Path, slurm: Mapping[str, str]) -> None:
    words = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=nowhere", "study=mine")
    refused = run(tmp_path, "-m", LEVELS, "threads=1", *words, environment=slurm)
    assert refused.returncode == 1
    (complaint,) = (line for line in refused.stderr.splitlines() if line.startswith("harness: "))
    assert "the launcher failed" in complaint
    assert "invalid partition" in complaint.lower()
    assert "Traceback" not in refused.stderr


def test_a_real_ray(tmp_path: Path) -> None:
    needs("hydra_plugins.hydra_ray_launcher")
    needs("ray")
    sweep_three_times(
        tmp_path,
        "hydra/launcher=ray",
        "+hydra.launcher.ray.init.num_cpus=2",
        environment={"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
    )


def _configure(folder: Path) -> Path:
    """The folders and files of munge and Slurm."""
    munge = folder / "munge"
    for place in (folder / "state", folder / "spool", munge):
        place.mkdir(parents=True)
    folder.chmod(0o755)
    (munge / "key").write_bytes(secrets.token_bytes(1024))
    owner = pwd.getpwnam("munge")
    for path in (munge, munge / "key"):
        os.chown(path, owner.pw_uid, owner.pw_gid)
    (munge / "key").chmod(0o400)
    munge.chmod(0o711)
    host = socket.gethostname().partition(".")[0]
    settings = {
        "ClusterName": "harness",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={munge / 'socket'}",
        "CredType": "cred/munge",
        "ProctrackType": "proctrack/pgid",
        "TaskPlugin": "task/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "ReturnToService": "2",
        "MpiDefault": "none",
        "SlurmctldPort": _free_port(),
        "SlurmdPort": _free_port(),
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        "SlurmctldPidFile": folder / "slurmctld.pid",
        "SlurmdPidFile": folder / "slurmd.pid",
        "SlurmctldLogFile": folder / "slurmctld.log",
        "SlurmdLogFile": folder / "slurmd.log",
    }
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines.append(f"NodeName={host} NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN")
    lines.append(f"PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP")
    config = folder / "slurm.conf"
    config.write_text("\n".join([*lines, ""]))
    return config


def _munged(folder: Path) -> list[str]:
    munge = folder / "munge"
    places = {
        "key-file": "key",
        "socket": "socket",
        "pid-file": "pid",
        "log-file": "log",
        "seed-file": "seed",
    }
    return [
        str(shutil.which("munged")),
        "--foreground",
        "--force",
        *(f"--{option}={munge / name}" for option, name in places.items()),
    ]


@contextlib.contextmanager
def _daemon(
    command: list[str], *, log: Path, user: str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A process in the foreground of its own group, ended behind the block."""
    with log.open("w") as stream:
        process = subprocess.Popen(
            command,
            user=user,
            group=user,
            extra_groups=[] if user else None,
            env={**os.environ, **(environment or {})},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _idle(environment: Mapping[str, str]) -> bool:
    done = subprocess.run(
        ["sinfo", "--noheader", "--format=%t"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    return done.stdout.split() == ["idle"]


def _wait_until(happened: object, fault: str, *, logs: Path | None = None) -> None:
    deadline = time.monotonic() + 60
    assert callable(happened)
    while not happened():
        if time.monotonic() > deadline:
            told = "".join(
                path.read_text(errors="replace")[-2000:] for path in (logs or Path()).glob("*.log")
            )
            pytest.fail(f"{fault} after a minute: {told}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
