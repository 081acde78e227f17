"""The interface of a probe: something that watches the phases of a running step."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from harness.record import Sample

#: Phases of a training step, in order.
PHASES = ("forward", "backward", "optimizer")


class Probe(Protocol):
    """Watches steps, phase by phase, and tells afterwards what it saw."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Entered and left around each phase of a step."""

    def samples(self) -> tuple[Sample, ...]:
        """What was seen since the probe was made."""


class Blind:
    """The probe that sees nothing."""

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    def samples(self) -> tuple[Sample, ...]:
        return ()
