"""A Slurm of one node on this machine, in a folder, without systemd."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")
_START_S = 40.0
_NODE = "here"

_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
MpiDefault=none
ReturnToService=1
KillWait=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={slurmd_port} CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={node} Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes={node} MaxTime=1 State=UP
"""


def why_not() -> str:
    """What keeps a Slurm from being started here; empty if nothing does."""
    path = os.environ.get("PATH", "") + os.pathsep + "/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, munge)"
    return "" if os.geteuid() == 0 else "slurmctld and munged are started as root here"


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """A running one.

    Args:
        environment: variables by which Slurm's commands find it.
    """

    environment: Mapping[str, str]

    def __call__(self, *command: str) -> str:
        """What one of Slurm's commands prints."""
        variables = {**os.environ, **self.environment}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def wait_for_jobs(self, n: int, *, state: str) -> list[str]:
        """The ids of jobs in a state, once there are so many."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            found = self("squeue", "--noheader", "--array", f"--states={state}", "--format=%i").split()
            if len(found) >= n:
                return found
            time.sleep(0.2)
        raise AssertionError(f"fewer than {n} jobs are {state}")


@contextlib.contextmanager
def running_slurm(*, cpus: int) -> Iterator[Slurm]:
    """Start one; its programs end with the context."""
    # Not pytest's folder: munge wants every folder above its socket closed to others' writing, or sticky.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        _start_munge(folder, stack)
        ctld_port, slurmd_port = _free_ports(2)
        for part in ("state", "spool"):
            (folder / part).mkdir()
        conf = folder / "slurm.conf"
        conf.write_text(
            _CONF.format(
                host=platform.node(),
                folder=folder,
                node=_NODE,
                cpus=cpus,
                ctld_port=ctld_port,
                slurmd_port=slurmd_port,
            )
        )
        slurm = Slurm(environment={"SLURM_CONF": str(conf)})
        _start(stack, ["slurmctld", "-D", "-i", "-f", str(conf)], folder / "slurmctld.out")
        _start(stack, ["slurmd", "-D", "-N", _NODE, "-f", str(conf)], folder / "slurmd.out")
        _wait_until_idle(slurm, folder)
        yield slurm


def _start_munge(folder: Path, stack: contextlib.ExitStack) -> None:
    place = folder / "munge"
    place.mkdir()
    key = place / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (place, key):
        shutil.chown(path, "munge", "munge")
    place.chmod(0o755)
    command = [
        "setpriv",
        "--reuid=munge",
        "--regid=munge",
        "--clear-groups",
        shutil.which("munged", path="/usr/sbin:/usr/local/sbin") or "munged",
        "--foreground",
        f"--key-file={key}",
        f"--socket={place}/socket",
        f"--pid-file={place}/pid",
        f"--log-file={place}/log",
        f"--seed-file={place}/seed",
        "--num-threads=2",
    ]
    _start(stack, command, folder / "munged.out")
    _wait(lambda: (place / "socket").exists(), "munged", folder)


def _start(stack: contextlib.ExitStack, command: Sequence[str], log: Path) -> None:
    """Start a program that ends with the stack; the last one first."""
    variables = {**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin"}
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=variables, start_new_session=True
        )
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_idle(slurm: Slurm, folder: Path) -> None:
    def idle() -> bool:
        try:
            return slurm("sinfo", "--noheader", "--partition=main", "--format=%t") == "idle"
        except subprocess.CalledProcessError:
            return False

    _wait(idle, "sinfo", folder)


def _wait(there: object, what: str, folder: Path) -> None:
    assert callable(there)
    deadline = time.monotonic() + _START_S
    while not there():
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"{path.name}: {path.read_text(errors='replace')[-1500:]}" for path in folder.rglob("*.log")
            )
            outs = "\n".join(
                f"{path.name}: {path.read_text(errors='replace')[-500:]}" for path in folder.rglob("*.out")
            )
            raise AssertionError(f"{what} is not ready\n{logs}\n{outs}")
        time.sleep(0.1)


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
