"""What a sweep says about itself."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from harness import progress
from harness.claims import claimed
from harness.metrics import time as times
from harness.plan import Placement, Plan, PlannedTrial
from harness.progress import (
    Progress,
    clock,
    headline,
    invalid_lines,
    label,
    last_word,
    outcomes,
    plan_lines,
    results,
)
from harness.record import Outcome, Sample, TrialRecord
from harness.store import Study

FACTORS = {"attention.n_hashes": ("1", "2"), "seed": ("0",)}


def planned(
    trial_id: str, rounds: int, *, state: str = "new", reason: str = "", backend: str = ""
) -> PlannedTrial:
    return PlannedTrial(
        trial_id=trial_id,
        state=state,
        reason=reason,
        cell={"attention.n_hashes": str(rounds), "seed": "0"},
        overrides=(),
        spec={},
        block="seed=0",
        wanted=state == "new",
        backend=backend,
    )


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    def make(*trials: PlannedTrial, duplicates: int = 0) -> Plan:
        study = Study(tmp_path / "mine")
        study.create()
        place = Placement(study=study, experiment="x", rerun="none", timeout_s=None, memory_limit_gib=None)
        return Plan(
            placement=place,
            trials=trials,
            duplicates=duplicates,
            factors=FACTORS,
            code="code",
            made_at="2026-02-01T00:00:00+00:00",
        )

    return make


def record(
    trial_id: str, *, at: str = "2026-02-01T00:00:01+00:00", samples: Sequence[Sample] = ()
) -> TrialRecord:
    return TrialRecord(
        trial_id=trial_id,
        experiment="x",
        cell={},
        code="code",
        spec={},
        outcome=Outcome(status="ok"),
        samples=tuple(samples),
        started_at=at,
        duration_s=18.2,
    )


def sample(metric: str, *values: float, phase: str | None = None) -> Sample:
    return Sample(metric=metric, unit="", values=values, phase=phase)


def test_a_good_trial_shows_quality_speed_and_memory() -> None:
    shown = results(
        record(
            "a",
            samples=[
                sample("correct", 49.0),
                sample("scored", 50.0),
                sample("tokens_per_step", 1230.0),
                sample("step_s", 0.1, 0.1, 9.0),
                sample("peak_alloc_bytes", 41 * 2**20, phase="forward"),
                sample("peak_alloc_bytes", 2**20, phase="backward"),
            ],
        )
    )
    assert shown == ["accuracy 0.980", "12.3k tokens/s", "41 MiB"]


def test_the_speed_is_the_reports_without_the_warm_up() -> None:
    steps = (9.0, 8.0, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    trial = record("a", samples=[sample("tokens_per_step", 1000.0), sample("step_s", *steps)])
    assert times.columns(trial)["tokens_per_s"] == pytest.approx(10_000.0)
    assert results(trial) == ["10k tokens/s"]


def test_text_is_measured_in_bits_per_byte() -> None:
    samples = [sample("scored", 10.0), sample("nll_nats", 13.862943611198906), sample("correct", 5.0)]
    text = replace(record("a", samples=samples), theory={"quality": "bits_per_byte"})
    assert results(text) == ["2.000 bits/byte"]


@pytest.mark.parametrize(
    "samples", [[], [sample("scored", 0.0), sample("correct", 0.0)], [sample("step_s", 0.0)]]
)
def test_what_was_not_measured_is_not_shown(samples: Sequence[Sample]) -> None:
    assert results(record("a", samples=samples)) == []


def test_a_trial_that_failed_shows_why_in_one_line() -> None:
    outcome = Outcome(status="error", message="LookupError:\n" + "x" * 200)
    (message,) = results(replace(record("a"), outcome=outcome))
    assert len(message) == 100
    assert message.startswith("LookupError: xxx")
    assert message.endswith("...")


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (["attention.n_hashes", "model.residual"], "n_hashes=4 residual=plain"),
        (["attention.chunk_length", "local.chunk_length"], "attention.chunk_length=8 local.chunk_length=9"),
        (["absent"], ""),
        ([], ""),
    ],
)
def test_label_drops_the_group_where_that_is_clear(factors: Sequence[str], expected: str) -> None:
    cell = {
        "attention.n_hashes": "4",
        "model.residual": "plain",
        "attention.chunk_length": "8",
        "local.chunk_length": "9",
        "seed": "0",
    }
    assert label(cell, dict.fromkeys(factors)) == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.6, "0:10"), (250, "4:10"), (3600, "1:00:00"), (36_061, "10:01:01")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_outcomes_in_their_order() -> None:
    assert outcomes({"killed": 1, "ok": 3, "timeout": 0}) == "3 ok, 1 killed"
    assert outcomes({}) == "none"


def test_headline_and_lines(plan_of: Callable[..., Plan]) -> None:
    done = planned("b", 2, state="done", reason="ok")
    odd = planned("c", 3, state="invalid", reason="odd")
    plan = plan_of(planned("a", 1), done, odd, duplicates=1)
    assert headline(plan) == (
        "study mine: 3 trials (1 done, 1 new, 1 invalid), 1 duplicate dropped, 1 to run"
    )
    assert invalid_lines(plan) == ["invalid  n_hashes=3 seed=0  odd"]
    assert plan_lines(plan) == [
        "  invalid  c  n_hashes=3 seed=0  odd",
        "  new      a  n_hashes=1 seed=0",
        "  done     b  n_hashes=2 seed=0  ok",
    ]


def test_lines_say_what_computes_each_trial(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(
        planned("a", 1, backend="reference"),
        planned("b", 2, state="done", reason="ok", backend="flash"),
        planned("c", 3, state="invalid", reason="odd"),
    )
    assert plan_lines(plan) == [
        "  invalid  c  n_hashes=3 seed=0             odd",
        "  new      a  n_hashes=1 seed=0  reference",
        "  done     b  n_hashes=2 seed=0  flash      ok",
    ]


def test_last_word_of_a_running_trial(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_word(log) == ""
    log.write_text("progress: step 1\nprogress: step 2\nnoise\n")
    assert last_word(log) == "step 2"


def test_each_trial_is_told_once_when_its_record_appears(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_POLL_S", 0.01)
    plan, stream = plan_of(planned("a", 1), planned("b", 2)), io.StringIO()
    study = plan.placement.study
    study.write(record("b", at="2026-01-01T00:00:00+00:00"))  # an older one, about to be replaced
    with Progress(plan, stream=stream, live=False) as watch:
        study.write(record("a"))
        wait_until(lambda: "[1/2]" in stream.getvalue())
        assert watch.finished == 1
        study.record_path("b").write_text("{")
        time.sleep(0.05)
        study.write(record("b"))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("[1/2] ok  n_hashes=1 seed=0  18.2 s  ETA 0:0")
    assert lines[1] == "[2/2] ok  n_hashes=2 seed=0  18.2 s"
    assert len(lines) == 2
    assert (watch.finished, watch.total, dict(watch.statuses)) == (2, 2, {"ok": 2})


def test_records_that_appear_together_are_told_in_the_order_they_started(
    plan_of: Callable[..., Plan],
) -> None:
    plan, stream = plan_of(planned("a", 1), planned("b", 2)), io.StringIO()
    with Progress(plan, stream=stream, live=False):
        plan.placement.study.write(record("a", at="2026-02-01T00:00:09+00:00"))
        plan.placement.study.write(record("b", at="2026-02-01T00:00:05+00:00"))
    assert [line[:5] for line in stream.getvalue().splitlines()] == ["[1/2]", "[2/2]"]
    assert "n_hashes=2" in stream.getvalue().splitlines()[0]


def test_a_terminal_sees_what_is_running(
    plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_POLL_S", 0.01)
    plan, stream = plan_of(planned("a", 1), planned("b", 2)), io.StringIO()
    study = plan.placement.study
    study.log_path("a").write_text("progress: step 7/9\n")
    with claimed(study, "a", timeout_s=None), Progress(plan, stream=stream, live=True):
        wait_until(lambda: "running" in stream.getvalue())
        with claimed(study, "b", timeout_s=None):
            wait_until(lambda: "(+1 more)" in stream.getvalue())
    text = stream.getvalue()
    assert "  running: n_hashes=1 seed=0  step 7/9  0:00" in text
    assert text.endswith("\r\x1b[2K")


def test_nobody_listening_stops_nothing(plan_of: Callable[..., Plan]) -> None:
    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    plan = plan_of(planned("a", 1))
    with Progress(plan, stream=Closed(), live=True) as watch:
        plan.placement.study.write(record("a"))
    assert watch.finished == 1


def test_the_thread_ends_with_the_sweep(plan_of: Callable[..., Plan]) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        Progress(plan_of(planned("a", 1)), stream=io.StringIO(), live=False),
    ):
        raise KeyboardInterrupt
    assert not any(thread.name == "progress" for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_claim_file_that_cannot_be_read_is_nobody_running(plan_of: Callable[..., Plan]) -> None:
    plan = plan_of(planned("a", 1))
    (plan.placement.study.trials / "a.claim").write_text(json.dumps({"pid": 1}))
    stream = io.StringIO()
    watch = Progress(plan, stream=stream, live=True)
    watch._print_running()
    assert stream.getvalue() == ""
