"""How long trials will take, by those that were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from harness.estimate import durations, total
from harness.plan import Placement, Plan, PlannedTrial
from harness.record import Outcome, TrialRecord, trial_id
from harness.store import Study


def spec(rounds: int, seed: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "attention": {"n_hashes": rounds},
        "seed": seed,
        "repeat": 0,
        "device": "cpu",
        "threads": 2,
        **more,
    }


def put(study: Study, data: dict[str, Any], *, took_s: float, flops: float | None = None) -> None:
    study.create()
    record = TrialRecord(
        trial_id=trial_id(data),
        experiment="mine",
        cell={},
        code="",
        spec=data,
        outcome=Outcome(status="ok"),
        environment={},
        theory={} if flops is None else {"predicted_trial_flops": flops},
        started_at="2026-01-01T00:00:00",
        duration_s=took_s,
    )
    study.write(record)


def plan_of(study: Study, *specs: dict[str, Any], flops: float | None = 6e9) -> Plan:
    placement = Placement(study=study, experiment="mine", rerun="none", timeout_s=None, memory_limit_gib=None)
    trials = tuple(
        PlannedTrial(
            trial_id=trial_id(data),
            state="new",
            reason="",
            cell={},
            overrides=(),
            spec=data,
            block="",
            wanted=True,
            forecast={} if flops is None else {"trial_flops": flops},
        )
        for data in specs
    )
    return Plan(placement=placement, trials=trials, duplicates=0, factors={}, code="", made_at="")


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(tmp_path / "results" / "mine")


def test_trials_of_the_same_setting_tell_first(study: Study) -> None:
    for seed, took_s in enumerate((3.0, 4.0, 50.0)):
        put(study, spec(2, seed), took_s=took_s, flops=1e9)
    plan = plan_of(study, spec(2, 7), spec(4))
    found = durations(plan)
    # The other setting by its operations, at the median rate of 0.25 GFLOP a second.
    assert list(found.values()) == [4.0, 24.0]
    assert total(plan.trials, found) == 28.0


def test_studies_beside_tell_where_this_one_is_new(study: Study) -> None:
    put(Study(study.path.parent / "other"), spec(2), took_s=2.0, flops=1e9)
    assert list(durations(plan_of(study, spec(8))).values()) == [12.0]


def test_another_machine_says_nothing_of_rates(study: Study) -> None:
    put(study, spec(2, threads=16), took_s=2.0, flops=1e9)
    plan = plan_of(study, spec(8))
    assert durations(plan) == {}
    assert total(plan.trials, {}) is None


def test_trials_that_nothing_tells_take_as_long_as_the_others(study: Study) -> None:
    put(study, spec(2), took_s=3.0)
    plan = plan_of(study, spec(2, 1), spec(4), flops=None)
    assert total(plan.trials, durations(plan)) == 6.0


def test_invalid_trials_take_no_time(study: Study) -> None:
    put(study, spec(2), took_s=3.0)
    plan = plan_of(study, spec(2, 1))
    invalid = replace(plan, trials=tuple(replace(trial, state="invalid") for trial in plan.trials))
    assert durations(invalid) == {}
