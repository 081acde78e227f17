"""How much memory a step needs, by the allocator and by the operating system.

Allocator peaks count the bytes of tensors: exact from run to run for equal torch, threads and CPU
capability. Resident peaks count pages of the process, everything included.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType, _enable_profiler
from torch._C._profiler import RecordScope
from torch.autograd.profiler import profile

from harness.record import Sample

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class CpuAllocator:
    """Peak bytes a phase from the profiler's stream of CPU allocations.

    The stream knows only what happens while it runs; what was allocated before is `held`.

    Args:
        held: bytes of the tensors that are alive when the first phase begins.
    """

    held: int
    _peaks: dict[str, int] = field(default_factory=dict)
    _saved: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()
        with _AllocationProfile(use_cpu=True, profile_memory=True) as profiler:
            yield
            gc.collect()
        changes = _allocations(profiler)
        self._peaks[name] = self.held + max(accumulate(changes, initial=0))
        self.held += sum(changes)
        if name == "forward":
            self._saved = sum(changes)

    def samples(self) -> tuple[Sample, ...]:
        """`peak_alloc_bytes` a phase, and `saved_bytes`: what forward leaves allocated for backward."""
        return (*_peaks("peak_alloc_bytes", self._peaks), _bytes("saved_bytes", self._saved))


@dataclass
class CudaAllocator:
    """Peak bytes a phase from the counters of torch's CUDA allocator, reset for each.

    Args:
        device: where the steps run.
    """

    device: torch.device
    _peaks: dict[str, int] = field(default_factory=dict)
    _reserved: int = 0
    _saved: int = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        yield
        gc.collect()
        torch.cuda.synchronize(self.device)
        self._peaks[name] = torch.cuda.max_memory_allocated(self.device)
        self._reserved = max(self._reserved, torch.cuda.max_memory_reserved(self.device))
        if name == "forward":
            self._saved = torch.cuda.memory_allocated(self.device) - before

    def samples(self) -> tuple[Sample, ...]:
        """As `CpuAllocator`, and `peak_reserved_bytes`."""
        return (
            *_peaks("peak_alloc_bytes", self._peaks),
            _bytes("peak_reserved_bytes", self._reserved),
            _bytes("saved_bytes", self._saved),
        )


@dataclass
class ResidentPeak:
    """The largest resident size of this process since the probe was made.

    On Linux the kernel's high-water mark is reset first, after garbage is collected and freed pages are
    given back; `ru_maxrss`, the fallback elsewhere, cannot be reset and may include a parent's peak.
    """

    _before: int = 0
    method: str = ""

    def __post_init__(self) -> None:
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        try:
            _CLEAR_REFS.write_text("5")
            self._before, self.method = _status_bytes("VmRSS"), "VmHWM"
        except OSError:
            self._before, self.method = _max_rss(), "ru_maxrss"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def samples(self) -> tuple[Sample, ...]:
        """`peak_rss_bytes`, and `peak_rss_delta_bytes` above what was resident at the start."""
        peak = _status_bytes("VmHWM") if self.method == "VmHWM" else _max_rss()
        return (_bytes("peak_rss_bytes", peak), _bytes("peak_rss_delta_bytes", max(0, peak - self._before)))


def held_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class _AllocationProfile(profile):
    """torch's profiler with an eye on memory alone.

    The operators of a long step would leave more events behind than the step needs memory. A torch in which
    the scopes of a profile cannot be chosen this way keeps them all, and the allocations are the same.
    """

    def _start_trace(self) -> None:
        begin: Any = _enable_profiler
        parent: Any = super()
        try:
            begin(parent.config(), self.kineto_activities, {RecordScope.USER_SCOPE})
        except TypeError:
            parent._start_trace()
        else:
            self.entered = True
            self.profiling_start_time_ns = time.perf_counter_ns()


def _allocations(profiler: Any) -> list[int]:
    """Signed sizes of all CPU allocations and frees, in the order they happened."""
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    cpu = [event for event in events if event.device_type() == DeviceType.CPU]
    return [event.nbytes() for event in sorted(cpu, key=lambda event: event.start_ns())]


def _peaks(metric: str, peaks: dict[str, int]) -> tuple[Sample, ...]:
    return tuple(_bytes(metric, value, phase=name) for name, value in peaks.items())


def _bytes(metric: str, value: int, *, phase: str | None = None) -> Sample:
    return Sample(metric=metric, unit="bytes", values=(float(value),), phase=phase)


def _status_bytes(key: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise OSError(f"{_STATUS} has no {key}")


def _max_rss() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
