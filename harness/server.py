"""The parent's end of the fork server: decode configs, run trials, end what takes too long.

All waiting blocks in `select`; the only regular wake-up, five times a second, notes how much memory the
trial holds, so that a record can say what it held when it was killed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from harness.environment import code_fingerprint
from harness.errors import HarnessError
from harness.protocol import PROTOCOL, next_message

_MEMORY_SAMPLING_S = 0.2
_CLOSING_S = 5.0
#: How folders begin that belong to a process, whose number follows.
_SCRATCH = "harness-of-"


class ServerError(HarnessError):
    """The measuring process did not start, or went away.

    Args:
        signal: the signal that ended it, if one did.
    """

    def __init__(self, message: str, *, signal: int | None = None) -> None:
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What became of one config: a spec and its id, or an error and the id of the config as it was.

    Args:
        backend: what will compute the attention; empty where there is one way only.
        timed: whether times are among what the trial measures.
        forecast: what it will cost, as far as that was asked for and is known (see `harness.forecast`).
    """

    trial_id: str
    spec: Mapping[str, Any] | None = None
    backend: str = ""
    timed: bool = True
    forecast: Mapping[str, float | None] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a trial's process ended."""

    exit: int | None
    signal: int | None
    oom_kill: bool
    timed_out: bool
    last_rss_bytes: int | None


class ForkServer:
    """One measuring process and its children; started when first needed, again after it has died."""

    def __init__(self) -> None:
        self.id = ""
        self.code = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = bytearray()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._block: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def decode(
        self, configs: Sequence[Mapping[str, Any]], *, check_device: bool, forecast: bool = False
    ) -> list[Decoded]:
        """Turn composed configs into specs.

        Args:
            check_device: whether a device that is not here makes a config invalid.
            forecast: whether to tell what the trials will cost.

        Raises:
            ServerError: the process did not start or died.
        """
        self._start()
        request = {"op": "decode", "configs": list(configs)}
        self._send({**request, "check_device": check_device, "forecast": forecast})
        return [Decoded(**result) for result in self._receive()["results"]]

    def run(
        self,
        spec: Mapping[str, Any],
        *,
        out: Path,
        log: Path,
        timeout_s: float | None = None,
        memory_limit_gib: float | None = None,
        weights: Path | None = None,
    ) -> Ending:
        """Run one trial in a fresh child and wait for its end.

        Args:
            out: where the child writes its measurement.
            log: where everything it prints goes.
            timeout_s: after so many seconds it is killed; None waits for ever.
            weights: where trained weights are kept, if the spec asks for it.

        Raises:
            ServerError: the server went away; the child went with it.
        """
        self._start()
        self._send(
            {
                "op": "run",
                "spec": spec,
                "out": str(out),
                "log": str(log),
                "memory_limit_gib": memory_limit_gib,
                "weights": None if weights is None else str(weights),
            }
        )
        try:
            return self._wait(self._receive()["pid"], timeout_s)
        except BaseException:
            # Whatever interrupted the waiting, the trial must not go on alone.
            self.close()
            raise

    def for_block(self, block: str) -> None:
        """Start afresh when a new block begins: children of one server share its address layout."""
        if self._block is not None and self._block != block:
            self.close()
        self._block = block

    def scratch(self) -> Path:
        """A folder for what passes between the processes; gone when the server is closed."""
        if self._folder is None:
            remove_left_behind()
            self._folder = tempfile.TemporaryDirectory(prefix=f"{_SCRATCH}{os.getpid()}-")
        return Path(self._folder.name)

    def close(self) -> None:
        """End the server and the trial it runs, if any."""
        process, self._process = self._process, None
        if process is not None:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            try:
                process.wait(_CLOSING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
        self._block = None

    # The pipe

    def _start(self) -> None:
        if self._process is not None:
            return
        self.code = code_fingerprint()
        self.id = uuid.uuid4().hex[:8]
        self._buffer = bytearray()
        with self._errors_path().open("wb") as errors:
            # A session of its own: Ctrl-C reaches the parent alone, which then ends the trial in order.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "harness.worker", "--serve"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                bufsize=0,
                start_new_session=True,
                env=_server_variables(),
            )
        greeting = self._receive()
        if greeting.get("protocol") != PROTOCOL:
            self.close()
            raise ServerError(f"the measuring process speaks another protocol than {PROTOCOL}: {greeting}")

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            data = memoryview(json.dumps(message).encode() + b"\n")
            while data:
                data = data[self._process.stdin.write(data) or 0 :]
        except OSError:
            raise self._gone() from None

    def _receive(self, timeout_s: float | None = None) -> dict[str, Any]:
        """The next reply; empty when there is none within `timeout_s`."""
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout

        def read_more() -> bool:
            if not select.select([pipe], [], [], timeout_s)[0]:
                return False
            data = os.read(pipe.fileno(), 1 << 16)
            if not data:
                raise self._gone()
            self._buffer += data
            return True

        reply = next_message(self._buffer, read_more)
        if reply is None:
            return {}
        if "error" in reply:
            raise ServerError(f"the measuring process answered: {reply['error']}")
        return reply

    def _wait(self, pid: int, timeout_s: float | None) -> Ending:
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        memory = _MemoryWatch(pid)
        timed_out = False
        while True:
            waiting = _MEMORY_SAMPLING_S
            if deadline is not None and not timed_out:
                waiting = min(waiting, max(0.0, deadline - time.monotonic()))
            reply = self._receive(waiting)
            if reply:
                return Ending(**reply, timed_out=timed_out, last_rss_bytes=memory.last_bytes)
            memory.look()
            if deadline is not None and not timed_out and time.monotonic() >= deadline:
                timed_out = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _gone(self) -> ServerError:
        """What to tell when the pipe has ended: why the process did, in its own last words."""
        assert self._process is not None
        try:
            code = self._process.wait(_CLOSING_S)
        except subprocess.TimeoutExpired:
            code = 0
        lines = self._errors_path().read_text(encoding="utf-8", errors="replace").strip().splitlines()
        words = lines[-1].strip() if lines else "it said nothing"
        self.close()
        if code < 0:
            name = signal.Signals(-code).name
            return ServerError(f"the measuring process was ended by {name}", signal=-code)
        return ServerError(f"the measuring process ended by itself (exit code {code}): {words}")

    def _errors_path(self) -> Path:
        return self.scratch() / "server.log"


def remove_left_behind() -> None:
    """Delete folders of processes that were killed and could not do it themselves."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*-*"):
        pid = path.name.removeprefix(_SCRATCH).partition("-")[0]
        with contextlib.suppress(OSError, ValueError):
            if path.stat().st_uid == os.getuid() and not _exists(int(pid)):
                shutil.rmtree(path)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class _MemoryWatch:
    """The resident memory of a process, remembered for when it is gone."""

    def __init__(self, pid: int) -> None:
        import psutil

        self.last_bytes: int | None = None
        self._gone = psutil.Error
        try:
            self._process: psutil.Process | None = psutil.Process(pid)
        except psutil.Error:
            self._process = None
        self.look()

    def look(self) -> None:
        if self._process is not None:
            with contextlib.suppress(self._gone):
                # A zombie holds nothing, which is not what it held when it died.
                self.last_bytes = self._process.memory_info().rss or self.last_bytes


@functools.cache
def process_server() -> ForkServer:
    """The one server of this process: jobs that a launcher runs one after the other share it."""
    return ForkServer()


def _server_variables() -> dict[str, str]:
    """The environment of the server: it must load the package that this process has loaded."""
    variables = dict(os.environ)
    root = str(Path(__file__).parent.parent)
    if root not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (root, variables.get("PYTHONPATH", ""))))
    return variables
