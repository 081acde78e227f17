"""What watches a running step: its time, its memory and its cost, one idea a file."""

from harness.probes.cost import Counter
from harness.probes.memory import CpuAllocator, CudaAllocator, ResidentPeak
from harness.probes.others import OthersWatch
from harness.probes.probe import Blind, Probe, Together
from harness.probes.time import Stopwatch

__all__ = [
    "Blind",
    "Counter",
    "CpuAllocator",
    "CudaAllocator",
    "OthersWatch",
    "Probe",
    "ResidentPeak",
    "Stopwatch",
    "Together",
]
