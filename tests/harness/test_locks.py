"""One lock a device, let go of by the kernel."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from harness import locks
from harness.locks import device_lock, lock_path
from tests.harness.conftest import harness_environment

HOLD = """
import sys, time
from pathlib import Path
from harness.locks import device_lock
with device_lock("cpu", folder=Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _complains_anew() -> None:
    locks._complain_once.cache_clear()


def test_devices_have_locks_of_their_own_and_one_waits_for_its_turn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    def second() -> None:
        with device_lock("cpu", folder=tmp_path) as held:
            order.append(f"second {held}")

    with device_lock("cpu", folder=tmp_path) as held, device_lock("cuda", folder=tmp_path) as other:
        assert held
        assert other
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second True"]
    assert "waiting for the timed trials of another process on this machine's cpu" in capsys.readouterr().err


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=harness_environment(),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    with lock_path("cpu", folder=tmp_path).open() as stream, pytest.raises(BlockingIOError):
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    started = time.monotonic()
    with device_lock("cpu", folder=tmp_path) as held:
        assert held
    assert time.monotonic() - started < 5


def test_anybody_may_lock_whoever_made_the_file(tmp_path: Path) -> None:
    umask = os.umask(0o077)
    try:
        with device_lock("cpu", folder=tmp_path):
            pass
    finally:
        os.umask(umask)
    assert lock_path("cpu", folder=tmp_path).stat().st_mode & 0o777 == 0o666


def test_no_link_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    lock_path("cpu", folder=tmp_path).symlink_to(elsewhere)
    with device_lock("cpu", folder=tmp_path) as held:
        assert not held
    assert not elsewhere.exists()
    assert "cannot be locked" in capsys.readouterr().err


def test_the_folder_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(locks.FOLDER_VARIABLE, str(tmp_path))
    assert lock_path("cpu").parent == tmp_path
    monkeypatch.delenv(locks.FOLDER_VARIABLE)
    assert lock_path("cpu").parent == Path(tempfile.gettempdir())


def test_names_of_devices_are_names_of_files(tmp_path: Path) -> None:
    assert lock_path("cuda:0/..", folder=tmp_path).parent == tmp_path
