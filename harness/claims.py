"""Who runs a trial: two sweeps over one study share the work instead of doing it twice.

A claim is a file made with O_EXCL beside the records. It is dead when the process that made it is gone,
and then anybody may take it over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.store import Study

#: How long after its time limit a claim of another machine still counts, and what counts without one.
_FOREIGN_GRACE_S = 60.0
_FOREIGN_LIMIT_S = 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Claim:
    """Who runs a trial.

    Args:
        host: name of the machine.
        boot: the kernel's id of this boot; a process number means nothing after the next one.
        started_at: seconds since the epoch.
        timeout_s: the trial's own time limit.
    """

    host: str
    pid: int
    boot: str
    started_at: float
    timeout_s: float | None

    @property
    def alive(self) -> bool:
        """Whether the trial may still be running."""
        if self.host != platform.node():
            limit = _FOREIGN_LIMIT_S if self.timeout_s is None else self.timeout_s
            return time.time() - self.started_at < limit + _FOREIGN_GRACE_S
        return self.boot == _boot_id() and _process_is_older(self.pid, self.started_at)


@contextlib.contextmanager
def claimed(study: Study, trial_id: str, *, timeout_s: float | None) -> Iterator[bool]:
    """Hold a trial while it runs; the value is False if somebody else does."""
    path = claim_path(study, trial_id)
    mine = Claim(
        host=platform.node(), pid=os.getpid(), boot=_boot_id(), started_at=time.time(), timeout_s=timeout_s
    )
    if not _take(path, mine):
        yield False
        return
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)


def claim_path(study: Study, trial_id: str) -> Path:
    """Where the claim of a trial lies."""
    return study.trials / f"{trial_id}.claim"


def read_claim(path: Path) -> Claim | None:
    """Who holds a trial; None if nobody does or the file cannot be understood."""
    try:
        return Claim(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def drop_dead(study: Study) -> None:
    """Remove claims whose processes are gone: a sweep that was killed cannot do it itself."""
    for path in study.trials.glob("*.claim"):
        if _is_dead(path):
            with _takeover_lock(study.trials):
                if _is_dead(path):
                    path.unlink(missing_ok=True)


def _take(path: Path, claim: Claim) -> bool:
    """Make the claim file, in place of a dead one if need be."""
    if _create(path, claim):
        return True
    if not _is_dead(path):
        return False
    # One at a time: whoever removes a dead claim must not remove the live one that another put there.
    with _takeover_lock(path.parent):
        if not _is_dead(path):
            return False
        path.unlink(missing_ok=True)
        return _create(path, claim)


@contextlib.contextmanager
def _takeover_lock(folder: Path) -> Iterator[None]:
    with (folder / ".takeover.lock").open("w") as stream:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _create(path: Path, claim: Claim) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        json.dump(asdict(claim), stream)
    return True


def _is_dead(path: Path) -> bool:
    holder = read_claim(path)
    if holder is not None:
        return not holder.alive
    return not _is_fresh(path)  # nobody's, or torn; a fresh one is being written this moment


def _is_fresh(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < 10.0
    except FileNotFoundError:
        return False


def _process_is_older(pid: int, moment: float) -> bool:
    """Whether the process exists and is not a later one that got the same number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= moment + 1.0
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""
