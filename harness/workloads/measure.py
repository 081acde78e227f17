"""Passes of a step under one probe each, so that no instrument disturbs another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from harness.probes import Blind, Counter, CpuAllocator, CudaAllocator, Probe, ResidentPeak
from harness.probes.memory import held_bytes
from harness.record import Sample

#: Passes of a warm session, each under a probe.
FOOTPRINT_STEPS = 3


class Subject(Protocol):
    """What takes steps: its device, its batches, and what it holds between two steps."""

    @property
    def device(self) -> torch.device: ...

    def batch(self, step: int) -> tuple[Tensor, Tensor]: ...

    def live_tensors(self) -> Iterator[Tensor]: ...


#: Takes one step on a batch under a probe.
Step = Callable[[tuple[Tensor, Tensor], Probe], object]


def measure_footprint(
    session: Subject,
    step: Step,
    *,
    warm: bool = False,
    tell: Callable[[str], None] = lambda message: None,
) -> tuple[tuple[Sample, ...], str]:
    """Memory and cost of a step, and how resident memory was read.

    Args:
        session: what takes steps.
        step: takes one.
        warm: whether it took some. Else a first one is not measured: it makes what later ones find made
            (optimizer state, cached plans).
        tell: told which pass begins.
    """
    batch = session.batch(0)
    if not warm:
        step(batch, Blind())
    tell("measuring resident memory")
    resident = ResidentPeak()
    step(batch, resident)
    # Read now: the next pass has a peak of its own.
    of_pages = resident.samples()
    tell("measuring the allocator")
    allocator = allocator_probe(session, batch)
    step(batch, allocator)
    tell("counting operations")
    counter = Counter()
    step(batch, counter)
    return (*of_pages, *allocator.samples(), *counter.samples()), resident.method


def allocator_probe(
    session: Subject, batch: tuple[Tensor, Tensor], *, held: int = 0
) -> CpuAllocator | CudaAllocator:
    """The probe of allocator peaks for steps on that batch, where so many bytes more are held all along."""
    if session.device.type == "cuda":
        return CudaAllocator(session.device)
    return CpuAllocator(held + held_bytes((*session.live_tensors(), *batch)))
