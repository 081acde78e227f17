"""Passes of a step under one probe each, so that no instrument disturbs another."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from harness.probes import Blind, Counter, CpuAllocator, CudaAllocator, Probe, ResidentPeak
from harness.probes.memory import held_bytes
from harness.record import Sample
from harness.workloads.session import Session

#: Takes one step on a batch under a probe.
Step = Callable[[tuple[Tensor, Tensor], Probe], object]


def measure_footprint(session: Session, step: Step) -> tuple[tuple[Sample, ...], str]:
    """Memory and cost of a step, and how resident memory was read.

    A first step is not measured: it makes what later steps find made (optimizer state, cached plans).
    """
    batch = session.batch(0)
    step(batch, Blind())
    resident = ResidentPeak()
    step(batch, resident)
    allocator = _allocator(session, batch)
    step(batch, allocator)
    counter = Counter()
    step(batch, counter)
    return (*resident.samples(), *allocator.samples(), *counter.samples()), resident.method


def _allocator(session: Session, batch: tuple[Tensor, Tensor]) -> CpuAllocator | CudaAllocator:
    if session.device.type == "cuda":
        return CudaAllocator(session.device)
    return CpuAllocator(held_bytes((*session.live_tensors(), *batch)))
