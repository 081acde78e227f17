"""The footprint of a step: one instrument a pass, after a pass that nobody watches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.probes import Blind, Counter, CpuAllocator, Probe, ResidentPeak
from harness.record import Sample
from harness.workloads.measure import Step, measure_footprint
from harness.workloads.session import Session, open_session
from tests.harness.specs import trial_spec


def training(session: Session) -> Step:
    return lambda batch, probe: session.train_step(batch, step=0, probe=probe)


def footprint(session: Session) -> tuple[Sample, ...]:
    return measure_footprint(session, training(session))[0]


def exact(samples: tuple[Sample, ...]) -> list[Sample]:
    """Without resident pages, which the rest of the process shares."""
    return [sample for sample in samples if "rss" not in sample.metric]


def test_every_quantity_is_there_once_with_its_unit() -> None:
    samples, method = measure_footprint(session := open_session(trial_spec()), training(session))
    assert {(sample.metric, sample.phase): sample.unit for sample in samples} == {
        ("peak_alloc_bytes", "forward"): "bytes",
        ("peak_alloc_bytes", "backward"): "bytes",
        ("peak_alloc_bytes", "optimizer"): "bytes",
        ("saved_bytes", None): "bytes",
        ("peak_rss_bytes", None): "bytes",
        ("peak_rss_delta_bytes", None): "bytes",
        ("flops", None): "flop",
        ("operators", None): "count",
    }
    assert len(samples) == 8
    assert all(len(sample.values) == 1 and not sample.at for sample in samples)
    assert all(value > 0 for sample in exact(samples) for value in sample.values)
    assert method == "VmHWM"


def test_each_instrument_has_a_pass_of_its_own_on_the_same_batch() -> None:
    session = open_session(trial_spec())
    passes: list[tuple[type[Probe], Tensor]] = []

    def step(batch: tuple[Tensor, Tensor], probe: Probe) -> None:
        passes.append((type(probe), batch[0]))
        training(session)(batch, probe)

    measure_footprint(session, step)
    assert [kind for kind, _ in passes] == [Blind, ResidentPeak, CpuAllocator, Counter]
    assert all((tokens == session.batch(0)[0]).all() for _, tokens in passes)


def test_the_resident_peak_is_that_of_its_own_pass() -> None:
    """The allocator's probe writes down every allocation: a long step's events are gigabytes."""
    session = open_session(trial_spec())

    def step(batch: tuple[Tensor, Tensor], probe: Probe) -> None:
        with probe.phase("forward"):
            torch.ones((256 if isinstance(probe, CpuAllocator) else 64) * 2**20, dtype=torch.uint8)

    samples, _ = measure_footprint(session, step)
    (more,) = (sample.values[0] for sample in samples if sample.metric == "peak_rss_delta_bytes")
    assert 32 * 2**20 < more < 160 * 2**20


def test_the_first_step_is_not_the_one_that_is_measured() -> None:
    session = open_session(trial_spec())
    assert exact(footprint(session)) == exact(footprint(session))


def test_what_lives_between_steps_counts_and_so_does_the_batch() -> None:
    session = open_session(trial_spec())
    session.train_step(session.batch(0), step=0, probe=Blind())

    def step(batch: tuple[Tensor, Tensor], probe: Probe) -> None:
        with probe.phase("forward"):
            torch.empty(12345, dtype=torch.uint8)

    samples, _ = measure_footprint(session, step)
    numbers = sum(value.numel() for value in session.model.parameters())
    moments = 2 * numbers + len(list(session.model.parameters()))  # AdamW's two, and a count of steps
    tokens = 2 * session.spec.train.batch_size * session.spec.task.length
    (peak,) = (sample.values[0] for sample in samples if sample.metric == "peak_alloc_bytes")
    assert peak == 4 * (numbers + moments) + 8 * tokens + 12345


@pytest.mark.parametrize(
    ("settings", "metric", "more"),
    [
        ({"train__batch_size": 6}, "saved_bytes", True),
        ({"model__residual": "reversible"}, "saved_bytes", False),
        ({"model__residual": "reversible"}, "flops", True),
        ({"model__n_layers": 4}, "operators", True),
        ({"attention__n_hashes": 4}, "flops", True),
    ],
)
def test_the_footprint_follows_the_settings(settings: dict[str, Any], metric: str, more: bool) -> None:
    def measured(**settings: Any) -> float:
        samples = footprint(open_session(trial_spec(**{"model__n_layers": 3, **settings})))
        return sum(sample.values[0] for sample in samples if sample.metric == metric)

    ratio = measured(**settings) / measured()
    assert ratio > 1.05 if more else ratio < 0.95
