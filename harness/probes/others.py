"""How much of the CPUs others took while steps were timed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

from harness.record import Sample

#: The kernel counts in hundredths of a second, so a shorter look would say little.
_WINDOW_S = 0.25
_STAT = Path("/proc/stat")
#: Columns of a CPU's line that are somebody's work; the last is what other machines took of this one.
_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL = 0, 1, 2, 5, 6, 7


@dataclass
class OthersWatch:
    """The share of this process's CPUs that other processes and machines used during each step.

    It looks at the kernel's counts between two steps, a quarter of a second apart at least; all steps in
    between get what was seen over them. Where the kernel tells nothing, there are no samples.
    """

    _steps: int = 0
    _shares: list[float] = field(default_factory=list)
    _last: _Look | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "forward":
            if self._last is None:
                self._last = _Look.now()
            elif time.monotonic() - self._last.moment >= _WINDOW_S:
                self._close()
            self._steps += 1
        yield

    def samples(self) -> tuple[Sample, ...]:
        """`others_cpu`: a share between 0 and 1 for each step."""
        self._close()
        if not self._shares:
            return ()
        return (Sample(metric="others_cpu", unit="ratio", values=tuple(self._shares)),)

    def _close(self) -> None:
        """End the window: its share belongs to the steps that were taken in it."""
        steps = self._steps - len(self._shares)
        look = _Look.now()
        if steps and self._last is not None and look is not None:
            self._shares += [round(look.others_since(self._last), 4)] * steps
        self._last = look


class _Look(NamedTuple):
    """Seconds since some moment: of the clock, of work on these CPUs, and of this process's part in it."""

    moment: float
    busy_s: float
    own_s: float
    cpus: int

    @classmethod
    def now(cls) -> Self | None:
        busy = _busy_seconds()
        if busy is None:
            return None
        return cls(time.monotonic(), sum(busy), time.process_time(), len(busy))

    def others_since(self, earlier: _Look) -> float:
        room = (self.moment - earlier.moment) * self.cpus
        others = (self.busy_s - earlier.busy_s) - (self.own_s - earlier.own_s)
        return min(1.0, max(0.0, others / room)) if room > 0 else 0.0


def _busy_seconds() -> list[float] | None:
    """Of each CPU that this process may use, since the machine started; None where nobody counts."""
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = os.sysconf("SC_CLK_TCK")
        lines = _STAT.read_text(encoding="ascii").splitlines()
    except (AttributeError, OSError, ValueError):
        return None
    busy = []
    for line in lines:
        name, *columns = line.split()
        if name in allowed and len(columns) > _STEAL:
            work = (columns[column] for column in (_USER, _NICE, _SYSTEM, _IRQ, _SOFTIRQ, _STEAL))
            busy.append(sum(map(int, work)) / ticks)
    return busy or None
