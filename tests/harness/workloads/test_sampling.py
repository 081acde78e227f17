"""When steps are enough."""

from __future__ import annotations

import random
import time

import pytest
from scipy.special import stdtrit

from harness.workloads import sampling as module
from harness.workloads.sampling import Sampling, relative_half_width
from tests.harness.specs import plain_spec, trial_spec


def taken(sampling: Sampling, *, spread: float, seed: int = 0) -> list[float]:
    """Times of the steps that are taken, of a machine on which they vary by so much."""
    draw, times = random.Random(seed), []
    for step in sampling.steps(lambda: times):
        assert step == len(times)
        times.append(0.1 * (1 + draw.gauss(0, spread)))
    return times


def test_without_a_precision_all_steps_are_taken() -> None:
    sampling = Sampling(at_most=7)
    assert (len(taken(sampling, spread=0.0)), sampling.stopped_by) == (7, "steps")


def test_steady_steps_are_soon_enough_and_unsteady_ones_are_not() -> None:
    steady = Sampling(at_most=500, precision=0.02)
    few = len(taken(steady, spread=0.001))
    # Five, or one more if the first looked like a warm-up.
    assert few in (5, 6)
    assert steady.stopped_by == "precision"
    unsteady = Sampling(at_most=500, precision=0.02)
    times = taken(unsteady, spread=0.1)
    # 1.96 · 0.1 / √n = 0.02 at about a hundred steps.
    assert 50 < len(times) < 200
    assert relative_half_width(times) <= 0.02 < relative_half_width(times[:-1])
    assert unsteady.stopped_by == "precision"


def test_a_budget_ends_it_after_one_step_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    sampling, steps = Sampling(at_most=100, budget_s=1.0), 0
    for _ in sampling.steps(list):
        steps += 1
        now[0] += 0.4
    assert (steps, sampling.stopped_by) == (3, "budget")
    steps = 0
    for _ in Sampling(at_most=9, budget_s=0.0).steps(list):
        steps += 1
        now[0] += 0.1
    assert steps == 1


def test_what_warms_up_does_not_count() -> None:
    steady = [0.1, 0.101, 0.099, 0.1, 0.1, 0.101, 0.099, 0.1]
    assert relative_half_width([5.0, 1.0, *steady]) == pytest.approx(relative_half_width(steady), rel=0.5)
    assert relative_half_width(steady[:4]) == float("inf")


@pytest.mark.parametrize("degrees", [4, 5, 10, 30, 1000])
def test_the_quantile_is_students(degrees: int) -> None:
    assert module._t(degrees) == pytest.approx(stdtrit(degrees, 0.975), rel=0.01)


@pytest.mark.parametrize("name", ["train_step.TrainStep", "attention.Attention", "forward.Forward"])
def test_a_trial_says_what_ended_its_timing(name: str) -> None:
    workload = {"_target_": f"harness.workloads.{name}", "timed_steps": 50, "precision": 0.9}
    spec = trial_spec(workload=workload)
    measurement = spec.workload(spec, progress=lambda message: None)
    steps = next(sample.values for sample in measurement.samples if sample.metric == "step_s")
    assert measurement.theory["stopped_by"] == "precision"
    assert 5 <= len(steps) < 50


@pytest.mark.parametrize("precision", [-0.1, 1.0])
def test_a_wrong_precision_is_refused(precision: float) -> None:
    with pytest.raises(ValueError, match=r"workload\.precision=.*: give a share"):
        trial_spec(workload={"_target_": "harness.workloads.forward.Forward", "precision": precision})


def test_trials_without_one_have_the_ids_they_always_had() -> None:
    from harness.codec import decode, encode

    workload = {"_target_": "harness.workloads.train_step.TrainStep", "timed_steps": 3}
    encoded = encode(decode(plain_spec(workload=workload)))["workload"]
    assert "precision" not in encoded
    assert encode(decode(plain_spec(workload={**workload, "precision": 0.1})))["workload"]["precision"] == 0.1
