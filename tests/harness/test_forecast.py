"""What a trial will cost: as its cost model says, and near what is measured."""

from __future__ import annotations

import pytest

from harness.forecast import forecast_of_steps
from harness.metrics import columns
from harness.spec import TrialSpec
from reformer.cost import step_cost
from tests.harness import factory
from tests.harness.specs import trial_spec


def spec(**settings: object) -> TrialSpec:
    return trial_spec(**settings)


def test_a_trial_is_its_steps_and_what_it_evaluates() -> None:
    small = spec()
    cost = step_cost(
        small.reformer_config(),
        batch=small.train.batch_size,
        seq=small.task.length,
        threads=small.threads,
        compiled=small.backend == "native",
    )
    tokens = small.train.batch_size * small.task.length
    forecast = forecast_of_steps(small, steps=7, evaluated_tokens=3 * tokens)
    assert forecast is not None
    assert forecast.flops == cost.flops
    assert forecast.trial_flops == 7 * cost.flops + 3 * cost.flops_by_phase["forward"]
    assert (forecast.saved_bytes, forecast.peak_alloc_bytes) == (cost.saved_bytes, cost.peak_bytes)
    assert forecast.theory()["predicted_flops"] == cost.flops


def test_what_no_formula_knows_is_left_out() -> None:
    half = forecast_of_steps(spec(dtype="bfloat16"), steps=1)
    assert half is not None
    assert half.peak_alloc_bytes is None
    assert "predicted_peak_alloc_bytes" not in half.theory()


@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_a_measured_trial_has_residuals_near_nothing(residual: str) -> None:
    small = spec(model__residual=residual, train__steps=1)
    measurement = small.workload(small, progress=lambda message: None)
    found = columns(factory.measured(measurement))
    assert found["flops_residual"] == pytest.approx(0, abs=1e-9)
    assert found["saved_bytes_residual"] == pytest.approx(0, abs=0.05)
    assert found["peak_alloc_bytes_residual"] == pytest.approx(0, abs=0.05)
