"""A workload that misbehaves on demand, run by the real measuring process.

It is reached through `--config-dir tests/harness/conf` and the environment variable
`HARNESS_ALLOW_TARGETS=tests.`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from harness.record import Measurement, Outcome, Sample
from harness.workloads.workload import Workload

if TYPE_CHECKING:
    from harness.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class Fake(Workload):
    """Does `does`, after `seconds` of sleep and while holding `mebibytes`."""

    timed: ClassVar[bool] = False

    does: str = "succeed"
    seconds: float = 0.0
    mebibytes: int = 0

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        held = bytearray(self.mebibytes << 20)
        progress(f"step 1/2\nof {self.does}")
        time.sleep(self.seconds)
        _ACTIONS[self.does](spec)
        samples = (
            Sample(metric="step_s", unit="s", values=(0.5, 0.5)),
            Sample(metric="tokens_per_step", unit="tokens", values=(1000.0,)),
            Sample(metric="correct", unit="tokens", values=(3.0,)),
            Sample(metric="scored", unit="tokens", values=(4.0,)),
            Sample(
                metric="peak_alloc_bytes", unit="bytes", values=(float(2**20 + len(held)),), phase="forward"
            ),
        )
        return Measurement(
            outcome=Outcome(status="ok"),
            samples=samples,
            theory={"quality": "accuracy"},
            environment={"pid": os.getpid(), "parent": os.getppid()},
        )


def _succeed(_: TrialSpec) -> None:
    pass


def _raise(_: TrialSpec) -> None:
    raise LookupError("the model\nwas not there")


def _raise_for_two_rounds(spec: TrialSpec) -> None:
    if spec.attention.n_hashes == 2:
        _raise(spec)


def _exit(_: TrialSpec) -> None:
    sys.exit(3)


def _vanish(_: TrialSpec) -> None:
    os._exit(0)


def _vanish_with_code(_: TrialSpec) -> None:
    os._exit(4)


def _print_garbage(_: TrialSpec) -> None:
    os.write(1, b"\xff\xfe no JSON {\n")
    os.write(2, b"\x00\x1b[31m and this on stderr\n")
    print('{"pid": 1}\n{"exit": 0}')


def _kill_itself(_: TrialSpec) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _crash(_: TrialSpec) -> None:
    ctypes.string_at(0)


def _abort_for_want_of_memory(_: TrialSpec) -> None:
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n")
    os.abort()


def _kill_the_server(_: TrialSpec) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(30)


def _allocate_in_torch(_: TrialSpec) -> None:
    import torch

    torch.ones(1 << 40)


def _allocate_in_python(_: TrialSpec) -> None:
    bytearray(1 << 42)


def _allocate_until_refused(_: TrialSpec) -> None:
    import torch

    held: list[torch.Tensor] = []
    while len(held) < 4096:
        held.append(torch.ones(1 << 18))


def _leave_a_process_behind(_: TrialSpec) -> None:
    process = subprocess.Popen(["sleep", "60"])
    print(f"left {process.pid}", flush=True)


_ACTIONS = {
    "succeed": _succeed,
    "raise": _raise,
    "raise_for_two_rounds": _raise_for_two_rounds,
    "exit": _exit,
    "vanish": _vanish,
    "vanish_with_code": _vanish_with_code,
    "print_garbage": _print_garbage,
    "kill_itself": _kill_itself,
    "crash": _crash,
    "abort_for_want_of_memory": _abort_for_want_of_memory,
    "kill_the_server": _kill_the_server,
    "allocate_in_torch": _allocate_in_torch,
    "allocate_in_python": _allocate_in_python,
    "allocate_until_refused": _allocate_until_refused,
    "leave_a_process_behind": _leave_a_process_behind,
}
