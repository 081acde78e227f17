"""Jobs through submitit to Slurm: watched by what `squeue` says, ended with the sweep, told in one line each.

submitit itself asks `sacct`, which clusters without an accounting database do not have, raises the first
fault in the middle of the others' work, and leaves its jobs behind after Ctrl-C.
"""

from __future__ import annotations

import io
import math
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus

from harness import wording
from harness.errors import HarnessError

_POLL_S = 0.5
#: Between two questions to the controller, which answers for a whole cluster.
_ASKING_S = (2.0, 20.0)
#: How long the result of a job that has ended may take to get here from its node.
_ARRIVAL_S = 15.0
#: How long jobs that are cancelled have for ending their trials.
_ENDING_S = 40.0
#: What a job needs beyond the time limit of its trial: Python's start, and submitit's warning before the end.
_MARGIN_MIN = 10

_ENDED = frozenset(
    [
        "BOOT_FAIL",
        "CANCELLED",
        "COMPLETED",
        "DEADLINE",
        "FAILED",
        "NODE_FAIL",
        "OUT_OF_MEMORY",
        "PREEMPTED",
        "REVOKED",
        "TIMEOUT",
    ]
)
#: Why a job is pending that will not start by itself.
_HOPELESS = frozenset(
    [
        "BadConstraints",
        "DependencyNeverSatisfied",
        "InvalidAccount",
        "InvalidQOS",
        "PartitionNodeLimit",
        "PartitionTimeLimit",
        "launch_failed_requeued_held",
    ]
)
#: Why jobs are pending that simply wait for their turn to be looked at.
_UNREMARKABLE = frozenset(("None", "(null)", "JobArrayTaskLimit", ""))


class SlurmError(HarnessError):
    """What Slurm did to a job instead of running it to its end."""


@dataclass(frozen=True)
class Job:
    """What a node is sent: the plugin's launcher, which runs one trial, and ends with it when told to."""

    launcher: Any

    def __call__(self, *args: Any) -> JobReturn:
        # submitit ignores SIGTERM; a trial that is cancelled or preempted would be killed half a minute later
        # and leave its claim behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        returned: JobReturn = self.launcher(*args)
        return returned

    def checkpoint(self, *args: Any) -> Any:
        """What submitit queues again after a preemption: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, *args)


def launch(
    launcher: Any, overrides: Sequence[Sequence[str]], *, threads: int, timeout_s: float | None
) -> list[JobReturn]:
    """Run one job for each list of overrides; one that came to nothing returns a `SlurmError`.

    Args:
        threads: CPUs that a job asks for, unless `hydra.launcher.cpus_per_task` says otherwise.
        timeout_s: the limit of a trial, which decides on that of a job unless `timeout_min` was typed.
    """
    jobs = _submit(launcher, overrides, threads=threads, timeout_s=timeout_s)
    watch = _Watch(jobs)
    try:
        return watch.returns()
    except BaseException:
        watch.cancel()
        raise


def _submit(
    launcher: Any, overrides: Sequence[Sequence[str]], *, threads: int, timeout_s: float | None
) -> list[Any]:
    import submitit
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    settings = dict(launcher.params)
    executor = submitit.AutoExecutor(
        cluster="slurm",
        folder=settings.pop("submitit_folder"),
        slurm_max_num_timeout=settings.pop("max_num_timeout"),
    )
    if settings["cpus_per_task"] is None and settings["cpus_per_gpu"] is None:
        settings["cpus_per_task"] = threads
    typed = launcher.config.hydra.overrides.hydra
    if timeout_s is not None and not any(line.startswith("hydra.launcher.timeout_min=") for line in typed):
        settings["timeout_min"] = math.ceil(timeout_s / 60) + _MARGIN_MIN
    shared = BaseQueueConf.__dataclass_fields__
    executor.update_parameters(
        **{key if key in shared else f"slurm_{key}": value for key, value in settings.items()}
    )
    state = Singleton.get_state()
    arguments = [
        (list(lines), "hydra.sweep.dir", index, f"job_id_for_{index}", state)
        for index, lines in enumerate(overrides)
    ]
    # submitit repeats on standard error what sbatch complains of, and raises it too.
    with redirect_stderr(io.StringIO()):
        jobs: list[Any] = executor.map_array(Job(launcher), *zip(*arguments, strict=True))
    return jobs


class _Watch:
    """Waits for jobs, as many as there are."""

    def __init__(self, jobs: Sequence[Any]) -> None:
        self._jobs = {str(job.job_id): job for job in jobs}
        self._returns: dict[str, JobReturn] = {}
        self._states: dict[str, tuple[str, str]] = {}
        self._told: set[str] = set()
        self._still = 0
        self._ended_at: dict[str, float] = {}
        self._pause_s = _ASKING_S[0]
        self._ask_at = time.monotonic() + self._pause_s

    def returns(self) -> list[JobReturn]:
        """Wait for all of them."""
        while True:
            self._collect()
            if len(self._returns) == len(self._jobs):
                return [self._returns[name] for name in self._jobs]
            if time.monotonic() >= self._ask_at:
                self._look()
            time.sleep(_POLL_S)

    def cancel(self) -> None:
        """End the jobs, and wait until their trials have ended."""
        names = [name for name in self._jobs if name not in self._returns]
        if not names:
            return
        _scancel(names)
        deadline = time.monotonic() + _ENDING_S
        while time.monotonic() < deadline:
            states = self._ask()
            if states is not None and not any(name in states for name in names):
                return
            time.sleep(_POLL_S)

    def _collect(self) -> None:
        """Take the results that are there."""
        for name, job in self._jobs.items():
            if name not in self._returns and job.paths.result_pickle.exists():
                try:
                    (self._returns[name],) = job.results()
                except Exception as error:
                    self._returns[name] = _failed(_last_line(str(error)))

    def _look(self) -> None:
        """Ask Slurm, tell what keeps jobs waiting, and give up on those that have ended without a result."""
        states = self._ask()
        self._pause_s = min(2 * self._pause_s, _ASKING_S[1])
        self._ask_at = time.monotonic() + self._pause_s
        if states is None:
            self._tell("Slurm does not answer; its jobs are waited for")
            return
        waiting = [name for name in self._jobs if name not in self._returns]
        now = time.monotonic()
        for name in waiting:
            state, reason = states.get(name, ("", ""))
            if state == "PENDING" and reason in _HOPELESS:
                _scancel([name])
                self._returns[name] = _failed(f"Slurm will not start the job ({reason})")
            elif not state:
                self._ask_at = min(self._ask_at, now + _ASKING_S[0])
                if now - self._ended_at.setdefault(name, now) >= _ARRIVAL_S:
                    self._returns[name] = _failed(self._ending(name))
        pending = [states[name][1] for name in waiting if states.get(name, ("",))[0] == "PENDING"]
        # Between two jobs nothing runs for a moment.
        self._still = self._still + 1 if len(pending) == len(waiting) else 0
        if self._still > 1:
            self._tell_reasons(pending)

    def _tell_reasons(self, pending: Sequence[str]) -> None:
        """Why the sweep stands still."""
        for reason, n in Counter(pending).items():
            if reason not in _UNREMARKABLE and reason not in _HOPELESS:
                self._tell(f"{wording.counted(n, 'job')} pending in Slurm: {reason}", about=reason)

    def _ask(self) -> Mapping[str, tuple[str, str]] | None:
        """State and reason of each job that has not ended; None if Slurm does not answer."""
        arrays = sorted({name.partition("_")[0] for name in self._jobs})
        command = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(arrays)}"]
        done = subprocess.run([*command, "--format=%i|%T|%r"], capture_output=True, text=True, check=False)
        if done.returncode and "Invalid job id" not in done.stderr:
            return None
        alive = {}
        for line in done.stdout.splitlines():
            name, state, reason = (part.strip() for part in line.split("|", 2))
            self._states[name] = state, reason
            if state not in _ENDED:
                alive[name] = state, reason
        return alive

    def _ending(self, name: str) -> str:
        state, _ = self._states.get(name, ("", ""))
        how = state if state in _ENDED else "unknown to it"
        job = self._jobs[name]
        words = _last_line(job.stderr() or "") if state != "CANCELLED" else ""
        return f"Slurm ended the job without a result ({how}){': ' if words else ''}{words}"

    def _tell(self, message: str, *, about: str = "") -> None:
        if (about or message) not in self._told:
            self._told.add(about or message)
            wording.complain(message)


def _scancel(names: Sequence[str]) -> None:
    subprocess.run(["scancel", *names], capture_output=True, check=False)


def _failed(message: str) -> JobReturn:
    returned = JobReturn()
    returned.status = JobStatus.FAILED
    returned.return_value = SlurmError(message)
    return returned


def _last_line(text: str) -> str:
    """What a log or a traceback ends with; submitit frames tracebacks with dashes."""
    framed = text.split("-" * 22)
    lines = (framed[1] if len(framed) >= 3 else text).strip().splitlines()
    return lines[-1].strip() if lines else ""
