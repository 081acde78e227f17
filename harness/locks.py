"""Timed trials keep out of each other's way, whichever sweep, user or launcher they belong to."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from harness.wording import complain

#: Names the folder of lock files, where it is not the machine's folder of temporary files.
FOLDER_VARIABLE = "HARNESS_LOCKS"
_MODE = 0o666


@contextlib.contextmanager
def device_lock(device: str, *, folder: Path | None = None) -> Iterator[bool]:
    """Hold the one lock that a device of this machine has, as soon as nobody else does.

    The kernel lets go of it when this process ends, however it ends.

    Args:
        device: as in a spec.
        folder: where lock files are; None is `$HARNESS_LOCKS`, else the machine's folder of temporary files.

    Yields:
        False if no lock can be had here: then nothing keeps two trials apart.
    """
    path = lock_path(device, folder=folder)
    try:
        descriptor = _open(path)
    except OSError as error:
        _complain_once(f"{path} cannot be locked ({error.strerror}): timed trials of others are not kept off")
        yield False
        return
    try:
        held = _wait_for(descriptor, device)
        yield held
    finally:
        os.close(descriptor)


def lock_path(device: str, *, folder: Path | None = None) -> Path:
    """The file whose lock belongs to a device."""
    name = re.sub(r"[^A-Za-z0-9]", "_", device)
    folder = folder or Path(os.environ.get(FOLDER_VARIABLE) or tempfile.gettempdir())
    return folder / f"reformer-harness-{name}.lock"


def _open(path: Path) -> int:
    """A descriptor that can be locked: anybody's file may be opened, but no link is followed."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        descriptor = os.open(path, flags | os.O_CREAT, _MODE)
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, _MODE)  # whatever the umask: the next one may be another user
        return descriptor


def _wait_for(descriptor: int, device: str) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _complain_once(
            f"waiting for the timed trials of another process on this machine's {device} "
            "(timing=shared does not wait)"
        )
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True


@functools.cache
def _complain_once(message: str) -> None:
    complain(message)
