"""Let the instruments measure what is known, so that `harness doctor` can see whether they tell the truth."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from harness.probes import (
    Blind,
    Counter,
    CpuAllocator,
    CudaAllocator,
    OthersWatch,
    Probe,
    ResidentPeak,
    Stopwatch,
)
from harness.record import Measurement, Outcome, Sample
from harness.tasks import corpora
from harness.workloads.workload import Workload
from reformer.kernels import native

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Sides of the product whose operations are counted.
PRODUCT = (37, 53, 71)
CORPORA = ("pycode",)
#: How long a piece of work is that takes turns with itself.
_WORK_S = 0.02
_SIDE = 256
_SLEEPS = 5


@dataclass(frozen=True, kw_only=True)
class SelfTest(Workload):
    """Known bytes, known seconds, known operations, and one piece of work that takes turns with itself.

    Args:
        mebibytes: what is held while memory is measured; the half of it stays for backward.
        sleep_s: what is slept while time is measured.
        pairs: pairs of turns, in the order A B, B A, A B …
    """

    timed: ClassVar[bool] = True

    mebibytes: int = 64
    sleep_s: float = 0.05
    pairs: int = 16

    def __post_init__(self) -> None:
        for name, least in (("mebibytes", 2), ("sleep_s", 0.001), ("pairs", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"workload.{name}={getattr(self, name)}: must be at least {least}")

    def backend(self, spec: TrialSpec) -> str:
        """No attention is computed."""
        return ""

    def __call__(self, spec: TrialSpec, *, progress: Callable[[str], None]) -> Measurement:
        started, device = time.monotonic(), torch.device(spec.device)
        progress("memory")
        # What the first operators load stays, and is none of what is held.
        _hold(Blind(), torch.device("cpu"), mebibytes=1)
        resident = ResidentPeak()
        _hold(resident, torch.device("cpu"), mebibytes=self.mebibytes)
        of_pages = resident.samples()
        allocator = CudaAllocator(device) if device.type == "cuda" else CpuAllocator(held=0)
        _hold(allocator, device, mebibytes=self.mebibytes)
        progress("time")
        stopwatch = Stopwatch(torch.device("cpu"))
        for _ in range(_SLEEPS):
            with stopwatch.phase("forward"):
                time.sleep(self.sleep_s)
        progress("operations")
        counter = Counter()
        rows, inner, columns = PRODUCT
        with counter.phase("forward"):
            _ = torch.ones(rows, inner, device=device) @ torch.ones(inner, columns, device=device)
        progress("turns")
        others = OthersWatch()
        turns = tuple(_turns(self.pairs, device, others))
        theory: dict[str, float | str | None] = {
            "threads": float(torch.get_num_threads()),
            "process": float(os.getpid()),
            "native": native.missing() or "",
            "cuda": _cuda(),
            **{f"corpus {name}": _corpus(name) for name in CORPORA},
        }
        return Measurement(
            outcome=Outcome(status="ok"),
            samples=(
                *of_pages,
                *allocator.samples(),
                *stopwatch.samples(),
                *(sample for sample in counter.samples() if sample.metric == "flops"),
                Sample(metric="turn_s", unit="s", values=turns),
                *others.samples(),
                Sample(metric="trial_s", unit="s", values=(time.monotonic() - started,)),
            ),
            theory=theory,
            environment={"mem_method": resident.method},
        )


def _hold(probe: Probe, device: torch.device, *, mebibytes: int) -> None:
    """Hold the known bytes, then the half of them; every page is written to."""
    half = mebibytes * 2**19
    with probe.phase("forward"):
        stays = torch.ones(half, dtype=torch.uint8, device=device)
        goes = torch.ones(mebibytes * 2**20 - half, dtype=torch.uint8, device=device)
        del goes
    del stays


def _turns(pairs: int, device: torch.device, others: OthersWatch) -> Iterator[float]:
    """Seconds of the same work again and again."""
    x = torch.full((_SIDE, _SIDE), 1 / _SIDE, device=device)
    _work(x, 10)
    with _clock(device) as took:
        _work(x, 10)
    count = max(1, round(10 * _WORK_S / max(took[0], 1e-9)))
    for _ in range(2 * pairs):
        with others.phase("forward"), _clock(device) as took:
            _work(x, count)
        yield took[0]


@contextmanager
def _clock(device: torch.device) -> Iterator[list[float]]:
    took = [0.0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    yield took
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took[0] = time.perf_counter() - started


def _work(x: torch.Tensor, count: int) -> torch.Tensor:
    y = x
    for _ in range(count):
        y = x @ y
    return y


def _cuda() -> str:
    """The names of the devices; empty if there is none."""
    if not torch.cuda.is_available():
        return ""
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def _corpus(name: str) -> str:
    """Its checksum, or what is wrong with it behind an exclamation mark."""
    try:
        return corpora.load(name).sha256
    except corpora.CorpusError as error:
        return f"! {error}"
