"""The stopwatch, by a clock that the test turns."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from harness.probes import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass."""
    now = [1000.0]

    def forward(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return forward


def values(stopwatch: Stopwatch) -> dict[str, tuple[float, ...]]:
    return {sample.metric: sample.values for sample in stopwatch.samples()}


def test_each_phase_of_each_step_has_its_time_and_a_step_is_their_sum(
    pass_time: Callable[[float], None],
) -> None:
    stopwatch = Stopwatch(CPU)
    for step in range(3):
        for phase, seconds in (("forward", 0.25), ("backward", 0.5), ("optimizer", 0.125)):
            with stopwatch.phase(phase):
                pass_time(seconds + step)
            pass_time(60)  # between the phases: nobody's time
    assert values(stopwatch) == {
        "forward_s": (0.25, 1.25, 2.25),
        "backward_s": (0.5, 1.5, 2.5),
        "optimizer_s": (0.125, 1.125, 2.125),
        "step_s": (0.875, 3.875, 6.875),
    }
    assert {sample.unit for sample in stopwatch.samples()} == {"s"}
    assert {sample.phase for sample in stopwatch.samples()} == {None}


def test_only_phases_that_ran_are_told(pass_time: Callable[[float], None]) -> None:
    stopwatch = Stopwatch(CPU)
    assert stopwatch.samples() == ()
    with stopwatch.phase("forward"):
        pass_time(2.0)
    assert values(stopwatch) == {"forward_s": (2.0,), "step_s": (2.0,)}


def test_asking_twice_gives_the_same_and_measuring_goes_on(pass_time: Callable[[float], None]) -> None:
    stopwatch = Stopwatch(CPU)
    for _ in range(2):
        with stopwatch.phase("forward"):
            pass_time(1.0)
        assert stopwatch.samples() == stopwatch.samples()
    assert values(stopwatch)["step_s"] == (1.0, 1.0)


def test_two_stopwatches_do_not_share_their_times(pass_time: Callable[[float], None]) -> None:
    first, second = Stopwatch(CPU), Stopwatch(CPU)
    with first.phase("forward"):
        pass_time(1.0)
    assert second.samples() == ()


def test_the_clock_is_monotonic_and_sees_waiting() -> None:
    stopwatch = Stopwatch(CPU)
    with stopwatch.phase("forward"):
        time.sleep(0.02)
    with stopwatch.phase("backward"):
        pass
    (waited,), (idle,) = values(stopwatch)["forward_s"], values(stopwatch)["backward_s"]
    assert 0 <= idle < waited
    assert waited >= 0.02
