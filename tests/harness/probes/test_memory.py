"""Memory by the allocator, exact on tensors of known size, and by the operating system."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd.profiler import profile

from harness.probes import Blind, CpuAllocator, ResidentPeak
from harness.probes import memory as memory_module
from harness.probes.memory import held_bytes
from harness.record import Sample
from harness.workloads.session import Session, open_session
from tests.harness.conftest import harness_environment
from tests.harness.specs import trial_spec

KIB, MIB = 2**10, 2**20


def block(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB, dtype=torch.uint8)


def by_phase(samples: tuple[Sample, ...], metric: str = "peak_alloc_bytes") -> dict[str | None, float]:
    assert {sample.unit for sample in samples} == {"bytes"}
    return {sample.phase: value for sample in samples if sample.metric == metric for value in sample.values}


# The allocator


def test_the_peak_is_the_most_that_is_held_at_once() -> None:
    for a_kib, b_kib, c_kib, peak_kib in ((300, 200, 100, 500), (100, 200, 300, 500), (50, 10, 90, 100)):
        allocator = CpuAllocator(7)
        with allocator.phase("forward"):
            a, b = block(a_kib), block(b_kib)
            del a
            c = block(c_kib)
        assert by_phase(allocator.samples()) == {"forward": 7 + peak_kib * KIB}
        assert by_phase(allocator.samples(), "saved_bytes") == {None: (b_kib + c_kib) * KIB}
        del b, c


def train_step_changes(kind: type[profile]) -> tuple[list[int], int]:
    """Allocations of a training step under a profiler, and how many events it left."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    x = torch.zeros(100, 64)
    model(x).sum().backward()  # the first gradients stay
    gc.collect()
    with kind(use_cpu=True, profile_memory=True) as profiler:
        model(x).square().mean().backward()
    return memory_module._allocations(profiler), len(profiler.kineto_results.events())


def test_operators_leave_no_events_and_allocations_are_the_whole_profilers() -> None:
    changes, events = train_step_changes(memory_module._AllocationProfile)
    expected, all_events = train_step_changes(profile)
    assert changes == expected
    assert len(changes) > 10
    assert events == len(changes) < all_events


def test_a_torch_without_scopes_is_watched_by_the_whole_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise TypeError("incompatible function arguments")

    expected, _ = train_step_changes(memory_module._AllocationProfile)
    monkeypatch.setattr(memory_module, "_enable_profiler", refuse)
    assert train_step_changes(memory_module._AllocationProfile)[0] == expected


def test_each_phase_has_a_peak_above_what_the_ones_before_left() -> None:
    held = block(1000)
    allocator = CpuAllocator(held_bytes([held]))
    with allocator.phase("forward"):
        saved, lost = block(400), block(100)
        del lost
    with allocator.phase("backward"):
        del saved
        gradient = block(300)
    with allocator.phase("optimizer"):
        moment = block(50)
        del gradient
    assert by_phase(allocator.samples()) == {
        "forward": 1500 * KIB,
        "backward": 1400 * KIB,
        "optimizer": 1350 * KIB,
    }
    assert by_phase(allocator.samples(), "saved_bytes") == {None: 400 * KIB}
    assert allocator.held == 1050 * KIB
    del moment


def test_a_phase_that_allocates_nothing_peaks_at_what_is_held() -> None:
    allocator = CpuAllocator(123)
    with allocator.phase("forward"):
        pass
    assert by_phase(allocator.samples()) == {"forward": 123}
    assert by_phase(allocator.samples(), "saved_bytes") == {None: 0}


def test_what_autograd_keeps_is_saved() -> None:
    x, w = torch.randn(16, 32), torch.randn(32, 64, requires_grad=True)
    allocator = CpuAllocator(0)
    with allocator.phase("forward"):
        # The product is lost once its positive part is made, which backward needs; the sum is a number.
        loss = (x @ w).relu().sum()
    assert by_phase(allocator.samples(), "saved_bytes") == {None: 16 * 64 * 4 + 4}
    assert by_phase(allocator.samples()) == {"forward": 2 * 16 * 64 * 4}
    with allocator.phase("backward"):
        loss.backward()
    assert allocator.held == 32 * 64 * 4 + 4


def in_a_cycle(tensor: torch.Tensor) -> None:
    """Make the tensor garbage that only the collector finds."""
    cycle: list[object] = [tensor]
    cycle.append(cycle)


def test_garbage_of_before_and_of_a_phase_is_not_counted_as_held() -> None:
    gc.disable()
    try:
        in_a_cycle(block(500))
        allocator = CpuAllocator(0)
        with allocator.phase("forward"):
            in_a_cycle(block(100))
        with allocator.phase("backward"):
            pass
    finally:
        gc.enable()
    assert by_phase(allocator.samples()) == {"forward": 100 * KIB, "backward": 0}
    assert by_phase(allocator.samples(), "saved_bytes") == {None: 0}


def test_a_storage_is_held_once_and_whole() -> None:
    whole, other = block(100), block(10)
    views = [whole, whole[5:], whole.view(torch.int32), whole[:0]]
    assert held_bytes(views) == 100 * KIB
    assert held_bytes([*views, other[:1]]) == 110 * KIB
    assert held_bytes([]) == 0


def opened(**settings: Any) -> Session:
    """A session whose optimizer has made its state."""
    session = open_session(trial_spec(**settings))
    session.train_step(session.batch(0), step=0, probe=Blind())
    return session


def step_of(session: Session) -> CpuAllocator:
    """What the allocator saw of a step."""
    batch = session.batch(0)
    allocator = CpuAllocator(held_bytes((*session.live_tensors(), *batch)))
    session.train_step(batch, step=0, probe=allocator)
    return allocator


@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_the_memory_of_a_step_is_the_same_run_to_run(residual: str) -> None:
    session, again = opened(model__residual=residual), opened(model__residual=residual)
    runs = [step_of(one).samples() for one in (session, session, again)]
    assert runs[0] == runs[1] == runs[2]
    assert all(sample.values[0] > 0 for sample in runs[0])


def test_a_step_gives_back_all_that_it_takes() -> None:
    session = opened()
    before = held_bytes(session.live_tensors())
    allocator = CpuAllocator(before)
    loss = session.train_step(session.batch(0), step=0, probe=allocator)
    assert allocator.held == before + held_bytes([loss])
    assert held_bytes(session.live_tensors()) == before


# The operating system


def test_pages_that_are_touched_are_seen_and_pages_that_are_not_are_not() -> None:
    probe = ResidentPeak()
    with probe.phase("forward"):
        touched = np.ones(64 * MIB, dtype=np.uint8)
        untouched = np.empty(512 * MIB, dtype=np.uint8)
        del touched, untouched
    told = {sample.metric: sample for sample in probe.samples()}
    assert set(told) == {"peak_rss_bytes", "peak_rss_delta_bytes"}
    delta, peak = (told[name].values[0] for name in ("peak_rss_delta_bytes", "peak_rss_bytes"))
    assert 63 * MIB < delta < 72 * MIB
    assert peak > delta + 50 * MIB  # Python and torch are in the process too
    assert probe.method == "VmHWM"
    assert {sample.unit for sample in probe.samples()} == {"bytes"}


def test_tensors_are_seen_too() -> None:
    probe = ResidentPeak()
    torch.ones(64 * MIB, dtype=torch.uint8)
    assert 63 * MIB < probe.samples()[1].values[0] < 72 * MIB


def test_a_peak_of_before_the_probe_is_forgotten() -> None:
    before = ResidentPeak()
    np.ones(256 * MIB, dtype=np.uint8).sum()
    after = ResidentPeak()
    assert after.samples()[1].values[0] < 8 * MIB
    assert after.samples()[0].values[0] < before.samples()[0].values[0] + 8 * MIB


def test_a_parents_peak_is_not_the_childs() -> None:
    ballast = np.ones(1024 * MIB, dtype=np.uint8)
    code = (
        "from harness.probes import ResidentPeak\n(peak, _) = ResidentPeak().samples()\nprint(peak.values[0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=harness_environment()
    )
    assert float(result.stdout) < ballast.nbytes
    del ballast


def test_where_the_kernel_forgets_no_peak_the_largest_so_far_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_module, "_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    probe = ResidentPeak()
    peak, delta = (sample.values[0] for sample in probe.samples())
    assert probe.method == "ru_maxrss"
    assert peak == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert delta == 0


WATCHED = """
import sys
import torch
from harness.probes import CpuAllocator

torch.set_num_threads(1)
MIB = 2**20

def work():
    # Eager operators with temporaries of several sizes, freed in another order than they were made.
    a = torch.ones(24 * MIB // 4)
    b = a * 2
    c = torch.cat([a, b])
    del a
    d = c.view(2, -1).sum(dim=0)
    e = torch.outer(d[:1024], d[:4096])
    del b, c
    return e.exp().add_(1), d

work()
if sys.argv[1] == "memray":
    import memray
    with memray.Tracker(sys.argv[2]):
        kept = work()
else:
    allocator = CpuAllocator(0)
    with allocator.phase("forward"):
        kept = work()
    print(next(int(s.values[0]) for s in allocator.samples() if s.metric == "peak_alloc_bytes"))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memray watches the allocations of Linux and macOS alone")
def test_the_allocators_peak_is_memrays_within_one_per_cent(tmp_path: Path) -> None:
    """memray, an independent instrument, sees each malloc of the process and so also what Python needs."""
    memray = pytest.importorskip("memray")
    results = tmp_path / "allocations.bin"
    for instrument in ("memray", "ours"):
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, instrument, str(results)],
            capture_output=True,
            text=True,
            check=True,
            env=harness_environment(),
        )
    expected = memray.FileReader(results).metadata.peak_memory
    assert expected > 90 * MIB
    assert int(done.stdout) == pytest.approx(expected, rel=0.01)
