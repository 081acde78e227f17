"""Training: what a record gets, that it is the same bit for bit, and how diverging ends it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from harness.record import Measurement, Sample
from harness.workloads import train as train_module
from harness.workloads.mechanism import UNITS
from harness.workloads.session import open_session
from harness.workloads.train_step import TrainStep
from tests.harness.specs import trial_spec

DIVERGING = {
    "train__optimizer": "sgd",
    "train__lr": 1e30,
    "train__clip": 0.0,
    "train__warmup_steps": 0,
    "train__steps": 50,
}


def trained(*, told: list[str] | None = None, **settings: Any) -> Measurement:
    spec = trial_spec(**settings)
    return spec.workload(spec, progress=(told if told is not None else []).append)


def losses(measurement: Measurement) -> list[float]:
    return list(measurement.series["train"]["loss"])


def reproducible(measurement: Measurement) -> list[Sample]:
    """All but times and resident pages."""
    return [
        sample
        for sample in measurement.samples
        if not sample.metric.endswith("_s") and "rss" not in sample.metric and sample.metric != "others_cpu"
    ]


def test_a_record_gets_all_there_is() -> None:
    measurement = trained()
    spec = trial_spec()
    evaluation = spec.task.evaluation_set(seed=0)
    assert measurement.outcome.status == "ok"
    assert measurement.series["train"]["step"] == [0.0, 1.0, 2.0, 3.0]
    assert measurement.outcome.checksum == losses(measurement)[-1].hex()
    assert measurement.theory == {
        "quality": "accuracy",
        "evaluation_sha256": evaluation.sha256(),
        **spec.task.theory(evaluation),
        **spec.workload.forecast(spec).theory(),
    }
    assert measurement.environment == {"mem_method": "VmHWM"}
    assert {sample.metric for sample in measurement.samples} == {
        "tokens_per_step",
        "parameters",
        "forward_s",
        "backward_s",
        "optimizer_s",
        "step_s",
        "others_cpu",
        "nll_nats",
        "correct",
        "scored",
        "peak_rss_bytes",
        "peak_rss_delta_bytes",
        "peak_alloc_bytes",
        "saved_bytes",
        "flops",
        "operators",
        *UNITS,
        "causality_leak",
    }
    places = [(sample.metric, sample.phase, tuple(sample.at.items())) for sample in measurement.samples]
    assert len(set(places)) == len(places)


def test_the_curve_and_the_grid_are_those_of_the_session() -> None:
    measurement = trained()
    session = open_session(spec := trial_spec())
    expected = [
        float(
            session.train_step(session.batch(step), step=step, probe=train_module.Stopwatch(session.device))
        )
        for step in range(4)
    ]
    assert losses(measurement) == expected
    quality = [sample for sample in measurement.samples if sample.metric in ("nll_nats", "correct", "scored")]
    assert quality == list(session.evaluate(spec.task.evaluation_set(seed=0)))


def test_the_same_seed_gives_the_same_numbers_bit_for_bit() -> None:
    settings = {"model__dropout": 0.1, "model__residual": "reversible"}
    one, other = trained(**settings), trained(**settings)
    assert one.outcome == other.outcome
    assert losses(one) == losses(other)
    assert reproducible(one) == reproducible(other)


def test_a_repeat_measures_the_same_and_another_seed_does_not() -> None:
    one, repeat, other = trained(), trained(repeat=1), trained(seed=1)
    assert losses(repeat) == losses(one)
    assert reproducible(repeat) == reproducible(one)
    assert repeat.theory == one.theory
    assert losses(other)[0] != losses(one)[0]
    assert other.theory["evaluation_sha256"] != one.theory["evaluation_sha256"]


def test_every_step_is_timed_and_a_step_is_its_phases() -> None:
    times = {sample.metric: sample for sample in trained(train__steps=5).samples if sample.unit == "s"}
    assert set(times) == {"forward_s", "backward_s", "optimizer_s", "step_s"}
    assert {len(sample.values) for sample in times.values()} == {5}
    phases = zip(*(times[f"{name}_s"].values for name in ("forward", "backward", "optimizer")), strict=True)
    assert times["step_s"].values == pytest.approx([sum(parts) for parts in phases])
    assert all(value > 0 for sample in times.values() for value in sample.values)


def test_training_learns() -> None:
    curve = losses(trained(train__steps=60, train__batch_size=16, task__n_symbols=2))
    assert sum(curve[-5:]) < 0.97 * sum(curve[:5])


def test_a_loss_that_is_no_number_ends_the_training_as_data() -> None:
    measurement = trained(**DIVERGING)
    curve = losses(measurement)
    assert measurement.outcome.status == "diverged"
    assert measurement.outcome.message == f"the loss was nan at step {len(curve) - 1} of 50"
    assert all(map(math.isfinite, curve[:-1]))
    assert math.isnan(curve[-1])
    assert measurement.series["train"]["step"] == [float(step) for step in range(len(curve))]
    assert {sample.metric for sample in measurement.samples} == {
        "tokens_per_step",
        "parameters",
        "forward_s",
        "backward_s",
        "optimizer_s",
        "step_s",
        "others_cpu",
    }
    assert measurement.theory["quality"] == "accuracy"
    assert not measurement.outcome.checksum


def test_weights_that_the_last_step_has_ruined_have_diverged_too() -> None:
    ending = len(losses(trained(**DIVERGING))) - 1
    measurement = trained(**{**DIVERGING, "train__steps": ending})
    assert all(map(math.isfinite, losses(measurement)))
    assert measurement.outcome.status == "diverged"
    assert measurement.outcome.message == f"the evaluation loss was nan after {ending} steps"
    assert all(math.isfinite(value) for sample in measurement.samples for value in sample.values)


def test_progress_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    trained(told=told)
    assert told == ["evaluating", "measuring memory and cost", "measuring the mechanism"]
    monkeypatch.setattr(train_module, "PROGRESS_EVERY_S", -1.0)
    told.clear()
    curve = losses(trained(told=told))
    assert told[:4] == [f"step {step + 1}/4 loss {loss:.3f}" for step, loss in enumerate(curve)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_run_to_the_end(dtype: str) -> None:
    measurement, exact = trained(dtype=dtype), trained()
    assert measurement.outcome.status == "ok"
    assert losses(measurement) != losses(exact)
    assert losses(measurement) == pytest.approx(losses(exact), abs=0.05)
    assert all(math.isfinite(value) for sample in measurement.samples for value in sample.values)


def test_text_is_told_in_bits_and_by_its_corpus() -> None:
    text = {"_target_": "harness.tasks.Text", "length": 32, "evaluation_tokens": 64}
    measurement = trained(task=text, train__steps=1, evaluate__n_hashes=[], evaluate__controls=[])
    assert measurement.outcome.status == "ok"
    assert measurement.theory["quality"] == "bits_per_byte"
    assert str(measurement.theory["corpus_sha256"]).startswith("5459d1a3880c")
    assert measurement.series["train"]["loss"][0] == pytest.approx(math.log(256), rel=0.2)


def test_a_task_without_an_evaluation_set_of_that_length_is_refused_before_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = trial_spec()
    assert spec.workload.backend(spec)

    def refuse(self: object) -> None:
        raise ValueError("task.length=9: no such windows")

    monkeypatch.setattr(type(spec.task), "check_evaluation", refuse)
    with pytest.raises(ValueError, match=r"no such windows"):
        spec.workload.backend(spec)
    assert TrainStep().backend(spec)
