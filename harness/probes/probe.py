"""The interface of a probe: something that watches the phases of a running step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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


class Together:
    """Several probes on the same steps; the first is around the others."""

    def __init__(self, *probes: Probe) -> None:
        self._probes = probes

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with ExitStack() as stack:
            for probe in self._probes:
                stack.enter_context(probe.phase(name))
            yield

    def samples(self) -> tuple[Sample, ...]:
        return tuple(sample for probe in self._probes for sample in probe.samples())
