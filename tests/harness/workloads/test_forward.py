"""Forward passes alone."""

from __future__ import annotations

import pytest

from harness.metrics import columns
from harness.record import Measurement
from reformer.cost import step_cost
from tests.harness import factory
from tests.harness.specs import trial_spec

WORKLOAD = {"_target_": "harness.workloads.forward.Forward", "warmup_steps": 1, "timed_steps": 3}


def measured(**settings: object) -> Measurement:
    spec = trial_spec(workload=WORKLOAD, **settings)
    return spec.workload(spec, progress=lambda message: None)


def found(measurement: Measurement) -> dict[str, float]:
    return columns(factory.measured(measurement))


def test_only_the_forward_pass_is_timed_and_nothing_is_kept() -> None:
    measurement = measured(model__residual="plain")
    steps = next(sample.values for sample in measurement.samples if sample.metric == "step_s")
    assert len(steps) == 3
    numbers = found(measurement)
    assert {"tokens_per_s", "forward_s", "peak_alloc_bytes", "peak_rss_bytes", "flops"} <= set(numbers)
    assert "backward_s" not in numbers
    assert numbers["saved_bytes"] == 0


def test_it_costs_what_the_forward_pass_of_a_training_step_costs() -> None:
    spec = trial_spec(model__residual="plain")
    cost = step_cost(
        spec.reformer_config(),
        batch=spec.train.batch_size,
        seq=spec.task.length,
        compiled=spec.backend == "native",
    )
    assert found(measured(model__residual="plain"))["flops"] == cost.flops_by_phase["forward"]


@pytest.mark.parametrize("wrong", [{"warmup_steps": -1}, {"timed_steps": 0}])
def test_a_wrong_setting_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"workload\.warmup_steps=.*: give at least 0 and 1"):
        trial_spec(workload={**WORKLOAD, **wrong})
