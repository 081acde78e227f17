"""How long each phase of each step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from harness.probes.probe import PHASES
from harness.record import Sample


@dataclass
class Stopwatch:
    """Seconds a phase: the monotonic clock on a CPU, events in the stream on CUDA, which wait for nothing.

    Args:
        device: where the steps run.
    """

    device: torch.device
    _seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    _events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
            return
        started = time.perf_counter()
        yield
        self._seconds[name].append(time.perf_counter() - started)

    def step_seconds(self) -> tuple[float, ...]:
        """Of the steps so far."""
        return next((sample.values for sample in self.samples() if sample.metric == "step_s"), ())

    def samples(self) -> tuple[Sample, ...]:
        """`forward_s`, `backward_s`, `optimizer_s` of the phases that ran, and `step_s`, their sum a step."""
        if self._events:
            torch.cuda.synchronize(self.device)
            for name, begin, end in self._events:
                self._seconds[name].append(begin.elapsed_time(end) / 1000)
            self._events.clear()
        ran = {name: values for name, values in self._seconds.items() if values}
        if not ran:
            return ()
        steps = [sum(values) for values in zip(*ran.values(), strict=True)]
        phases = tuple(
            Sample(metric=f"{name}_s", unit="s", values=tuple(round(value, 9) for value in values))
            for name, values in ran.items()
        )
        return (*phases, Sample(metric="step_s", unit="s", values=tuple(round(value, 9) for value in steps)))
