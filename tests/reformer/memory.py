"""What a call allocates, from the profiler's record of the allocator: exact, and the same each time."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Allocations:
    """Bytes above what was held before the call.

    Args:
        peak: most at any moment.
        kept: what the call left behind, its result included.
        largest: the largest single tensor storage.
    """

    peak: int
    kept: int
    largest: int


def allocations(function: Callable[[], Any]) -> Allocations:
    """Run the function and add up what it allocates and frees; the result lives until the end is counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    del result
    held = list(itertools.accumulate(sizes, initial=0))
    return Allocations(peak=max(held), kept=held[-1], largest=max(sizes, default=0))


def tensor_bytes(*shape: int, dtype: torch.dtype = torch.float32) -> int:
    return torch.empty(shape, dtype=dtype, device="meta").numel() * dtype.itemsize
