"""What others take of the CPUs, by a kernel and a clock that the test turns."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from harness.probes import OthersWatch, Stopwatch, Together
from harness.probes import others as others_module

TICKS = os.sysconf("SC_CLK_TCK")


class Machine:
    """Two CPUs that this process may use and one that it may not; everything in seconds."""

    def __init__(self, stat: Path) -> None:
        self.stat, self.now, self.own, self.busy = stat, 0.0, 0.0, [0.0, 0.0, 0.0]
        self.write()

    def write(self) -> None:
        lines = ["cpu  1 2 3 4 5 6 7 8 0 0"]
        for number, busy in enumerate(self.busy):
            user, steal = int(busy * TICKS) // 2, int(busy * TICKS) - int(busy * TICKS) // 2
            lines.append(f"cpu{number} {user} 0 0 99999 77 0 0 {steal} 0 0")
        self.stat.write_text("\n".join([*lines, "intr 1 2 3"]))

    def passes(self, seconds: float, *, own: float, others: float = 0.0, elsewhere: float = 0.0) -> None:
        self.now += seconds
        self.own += own
        self.busy[0] += own
        self.busy[1] += others
        self.busy[2] += elsewhere
        self.write()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(tmp_path / "stat")
    monkeypatch.setattr(others_module, "_STAT", machine.stat)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(time, "monotonic", lambda: machine.now)
    monkeypatch.setattr(time, "process_time", lambda: machine.own)
    return machine


def shares(watch: OthersWatch) -> tuple[float, ...]:
    return next((sample.values for sample in watch.samples()), ())


def step(watch: OthersWatch, during: Callable[[], None]) -> None:
    for phase in ("forward", "backward"):
        with watch.phase(phase):
            if phase == "forward":
                during()


def test_the_share_of_what_is_neither_idle_nor_ours(machine: Machine) -> None:
    watch = OthersWatch()
    step(watch, lambda: machine.passes(1.0, own=1.0))
    step(watch, lambda: machine.passes(1.0, own=0.5, others=0.5, elsewhere=1.0))
    step(watch, lambda: machine.passes(2.0, own=1.0, others=2.0))
    assert shares(watch) == (0.0, 0.25, 0.5)


def test_short_steps_share_a_look(machine: Machine) -> None:
    watch = OthersWatch()
    for _ in range(4):
        step(watch, lambda: machine.passes(0.2, own=0.0, others=0.1))
    assert shares(watch) == (0.25,) * 4
    # Asking changes nothing, and later steps count by themselves.
    step(watch, lambda: machine.passes(0.5, own=0.5))
    assert shares(watch) == (0.25,) * 4 + (0.0,)


def test_a_machine_that_does_not_count_gives_no_samples(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(others_module, "_STAT", tmp_path / "nothing")
    watch = OthersWatch()
    step(watch, lambda: None)
    assert watch.samples() == ()


def test_a_neighbour_is_seen_for_real() -> None:
    def busy_for(seconds: float, watch: OthersWatch) -> float:
        until = time.monotonic() + seconds
        with watch.phase("forward"):
            while time.monotonic() < until:
                pass
        return shares(watch)[-1]

    allowed = sorted(os.sched_getaffinity(0))
    neighbours = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in allowed]
    try:
        time.sleep(0.2)
        assert busy_for(0.6, OthersWatch()) > 0.25
    finally:
        for process in neighbours:
            process.kill()
            process.wait()


def test_together_is_both_at_once() -> None:
    stopwatch, watch = Stopwatch(torch.device("cpu")), OthersWatch()
    both = Together(watch, stopwatch)
    with both.phase("forward"):
        time.sleep(0.01)
    assert {sample.metric for sample in both.samples()} == {"forward_s", "step_s", "others_cpu"}
