"""Steps that are measured without training to any end."""

from __future__ import annotations

from typing import Any

import pytest

from harness.probes import Blind
from harness.record import Measurement
from harness.workloads.session import open_session
from harness.workloads.train_step import TrainStep
from tests.harness.specs import trial_spec


def measured(workload: TrainStep, *, told: list[str] | None = None, **settings: Any) -> Measurement:
    return workload(trial_spec(**settings), progress=(told if told is not None else []).append)


def test_only_steps_after_the_warm_up_are_timed() -> None:
    told: list[str] = []
    measurement = measured(TrainStep(warmup_steps=3, timed_steps=2), told=told)
    times = {sample.metric: len(sample.values) for sample in measurement.samples if sample.unit == "s"}
    assert times == {"forward_s": 2, "backward_s": 2, "optimizer_s": 2, "step_s": 2}
    passes = ["measuring resident memory", "measuring the allocator", "counting operations"]
    assert told == [*(f"step {step}/5" for step in range(1, 6)), *passes]


def test_it_takes_the_steps_of_training_whatever_their_number_in_the_spec() -> None:
    measurement = measured(TrainStep(warmup_steps=1, timed_steps=2), train__steps=1)
    session = open_session(trial_spec())
    for step in range(3):
        loss = session.train_step(session.batch(step), step=step, probe=Blind())
    assert measurement.outcome.checksum == float(loss).hex()
    assert measurement.outcome.status == "ok"


def test_there_is_a_footprint_and_no_quality() -> None:
    measurement = measured(TrainStep(warmup_steps=0, timed_steps=1))
    assert {sample.metric for sample in measurement.samples if sample.unit != "s"} == {
        "tokens_per_step",
        "parameters",
        "peak_rss_bytes",
        "peak_rss_delta_bytes",
        "peak_alloc_bytes",
        "saved_bytes",
        "flops",
        "operators",
        "floor_flops",
        "gemm_flop_per_s",
        "others_cpu",
    }
    assert measurement.environment == {"mem_method": "VmHWM"}
    assert not measurement.series
    assert measurement.theory["stopped_by"] == "steps"
    assert "predicted_flops" in measurement.theory


def test_the_footprint_is_that_of_a_training_step() -> None:
    spec = trial_spec()
    trained = spec.workload(spec, progress=[].append)
    alone = measured(TrainStep())
    for metric in ("peak_alloc_bytes", "saved_bytes", "flops", "operators", "parameters", "tokens_per_step"):
        ours, theirs = (
            [sample for sample in measurement.samples if sample.metric == metric]
            for measurement in (alone, trained)
        )
        assert ours == theirs


@pytest.mark.parametrize(("warmup_steps", "timed_steps"), [(-1, 1), (0, 0)])
def test_too_few_steps_are_told(warmup_steps: int, timed_steps: int) -> None:
    with pytest.raises(ValueError, match="workload") as caught:
        TrainStep(warmup_steps=warmup_steps, timed_steps=timed_steps)
    assert str(caught.value) == (
        f"workload.warmup_steps={warmup_steps}, workload.timed_steps={timed_steps}: give at least 0 and 1"
    )
