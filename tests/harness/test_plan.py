"""Deciding what a sweep does, without Hydra and without running anything."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import UsageError
from harness.plan import (
    Cell,
    Found,
    Placement,
    Plan,
    PlannedTrial,
    block_of,
    in_blocks,
    look_up,
    make_plan,
    spec_lines,
    study_info,
)
from harness.record import Outcome, TrialRecord
from harness.runner import forget_invalid, record_invalid
from harness.server import Decoded
from harness.store import Study

CODE = "0123456789ab"


def placement(tmp_path: Path, rerun: str = "none") -> Placement:
    study = Study(tmp_path / "mine")
    study.create()
    return Placement(study=study, experiment="mine", rerun=rerun, timeout_s=None, memory_limit_gib=None)


def cell(**levels: str) -> Cell:
    overrides = tuple(f"{key}={level}" for key, level in levels.items())
    return Cell(overrides=overrides, levels={"seed": "0", **levels}, config=dict(levels))


def record(trial_id: str, status: str = "ok", code: str = CODE, message: str = "") -> TrialRecord:
    return TrialRecord(
        trial_id=trial_id,
        experiment="mine",
        cell={},
        code=code,
        spec={},
        outcome=Outcome(status=status, message=message),
        started_at="2026-01-01T00:00:00+00:00",
    )


def plan_of(
    place: Placement,
    cells: Sequence[Cell],
    decoded: Sequence[Decoded],
    factors: Mapping[str, Any] | None = None,
) -> Plan:
    return make_plan(
        cells, decoded, placement=place, factors=factors or {}, code=CODE, made_at="2026-02-01T00:00:00+00:00"
    )


@pytest.fixture
def four(tmp_path: Path) -> Callable[[str], Plan]:
    """Plans a done, a failed, a stale failed, a stale, a new, a torn and an invalid trial."""

    def plan(rerun: str) -> Plan:
        place = placement(tmp_path, rerun)
        for name, status, code in (
            ("done", "ok", CODE),
            ("fail", "error", CODE),
            ("oldf", "killed", "other"),
            ("oldd", "timeout", "other"),
        ):
            if place.study.read(name) is None:
                place.study.write(record(name, status, code, message="why"))
        place.study.record_path("torn").write_text("{")
        names = ["done", "fail", "oldf", "oldd", "news", "torn"]
        decoded = [Decoded(trial_id=name, spec={"name": name}) for name in names]
        decoded.append(Decoded(trial_id="odds", error="n_buckets=3: odd"))
        return plan_of(place, [cell(x=str(index)) for index in range(7)], decoded)

    return plan


@pytest.mark.parametrize(
    ("rerun", "wanted"),
    [
        ("none", {"news", "torn"}),
        ("failed", {"news", "torn", "fail", "oldf"}),
        ("stale", {"news", "torn", "oldf", "oldd"}),
        ("all", {"news", "torn", "fail", "oldf", "oldd", "done"}),
    ],
)
def test_what_runs_under_each_rerun(rerun: str, wanted: set[str], four: Callable[[str], Plan]) -> None:
    assert {trial.trial_id for trial in four(rerun).to_run} == wanted


def test_states_and_reasons(four: Callable[[str], Plan]) -> None:
    found = {trial.trial_id: (trial.state, trial.reason) for trial in four("none").trials}
    assert found["done"] == ("done", "ok: why")
    assert found["fail"] == ("failed", "error: why")
    assert found["oldf"] == ("stale", "killed: why (measured with other code, other)")
    assert found["news"] == ("new", "")
    assert found["torn"][0] == "new"
    assert "cannot be read" in found["torn"][1]
    assert found["odds"] == ("invalid", "n_buckets=3: odd")
    assert four("none").counts() == {"invalid": 1, "failed": 1, "stale": 2, "new": 2, "done": 1}


def test_an_invalid_trial_never_runs() -> None:
    assert not any(Found(state="invalid").wanted(rerun) for rerun in ("none", "failed", "stale", "all"))


def test_equal_trials_run_once(tmp_path: Path) -> None:
    cells = [cell(a="1"), cell(a="1.0"), cell(a="2")]
    decoded = [Decoded(trial_id=name, spec={}) for name in ("one", "one", "two")]
    plan = plan_of(placement(tmp_path), cells, decoded)
    assert [trial.trial_id for trial in plan.trials] == ["one", "two"]
    assert plan.duplicates == 1
    assert plan.trials[0].cell == {"seed": "0", "a": "1"}


def test_single_means_nothing_is_swept(tmp_path: Path) -> None:
    place = placement(tmp_path)
    assert plan_of(place, [cell()], [Decoded(trial_id="one", spec={})]).single
    assert not plan_of(place, [cell()], [Decoded(trial_id="one", spec={})], {"a": ("1",)}).single


def trial(trial_id: str, **levels: str) -> PlannedTrial:
    return PlannedTrial(
        trial_id=trial_id,
        state="new",
        reason="",
        cell=levels,
        overrides=(),
        spec={},
        block=block_of(levels),
        wanted=True,
    )


@given(st.integers(1, 6), st.integers(1, 3), st.randoms(use_true_random=False))
def test_order_is_whole_blocks_and_always_the_same(n: int, seeds: int, chance: random.Random) -> None:
    trials = [
        trial(f"{seed}{index}", seed=str(seed), a=str(index)) for seed in range(seeds) for index in range(n)
    ]
    ordered = in_blocks(trials)
    assert [int(t.cell["seed"]) for t in ordered] == sorted([*range(seeds)] * n)
    assert sorted(t.trial_id for t in ordered) == sorted(t.trial_id for t in trials)
    blocks = [[t for t in trials if t.cell["seed"] == str(seed)] for seed in range(seeds)]
    for block in blocks:
        chance.shuffle(block)
    assert in_blocks([t for block in blocks for t in block]) == ordered


def test_blocks_are_shuffled_each_in_its_own_way() -> None:
    trials = [trial(f"{seed}-{i:02d}", seed=seed, a=str(i)) for seed in "01" for i in range(20)]
    ordered = [t.trial_id[2:] for t in in_blocks(trials)]
    assert ordered[:20] != sorted(ordered[:20])
    assert ordered[:20] != ordered[20:]


def test_implementations_take_turns_at_what_is_equal_besides() -> None:
    cells = [
        {"implementation": name, "length": length}
        for name in ("ours", "sdpa", "other")
        for length in ("1", "2", "3", "4")
    ]
    trials = [trial(f"{i:02d}", seed="0", **levels) for i, levels in enumerate(cells)]
    ordered = [t.cell for t in in_blocks(trials)]
    turns = [ordered[start : start + 3] for start in range(0, 12, 3)]
    assert all(len({t["length"] for t in turn}) == 1 for turn in turns)
    assert {t["length"] for t in ordered} == {"1", "2", "3", "4"}
    assert len({tuple(t["implementation"] for t in turn) for turn in turns}) > 1


def test_a_repeat_is_a_block_of_its_own() -> None:
    assert block_of({"repeat": "1", "seed": "0", "a": "3"}) == "seed=0 repeat=1"
    assert block_of({"a": "3"}) == ""


def test_study_info_merges_the_levels_of_two_sweeps(tmp_path: Path) -> None:
    place = placement(tmp_path)
    first = plan_of(place, [cell(a="1")], [Decoded(trial_id="one", spec={})], {"a": ("1",), "b": ("x", "y")})
    place.study.write_info(study_info(first, command="harness run 1", versions={"torch": "2"}))
    second = plan_of(place, [cell(a="2")], [Decoded(trial_id="two", spec={})], {"a": ("2", "1")})
    info = study_info(second, command="harness run 2", versions={})
    assert info["factors"] == {"a": ["1", "2"], "b": ["x", "y"]}
    assert info["command"] == "harness run 2"
    assert info["planned"] == ["two"]
    assert info["overrides"] == {"one": ["a=1"], "two": ["a=2"]}
    assert (info["name"], info["experiment"]) == ("mine", "mine")


def test_spec_lines_leave_invalid_cells_out(tmp_path: Path) -> None:
    decoded = [Decoded(trial_id="one", spec={"a": 1}), Decoded(trial_id="two", error="no")]
    plan = plan_of(placement(tmp_path), [cell(a="1"), cell(a="2")], decoded)
    (line,) = spec_lines(plan).splitlines()
    assert json.loads(line) == {
        "trial_id": "one",
        "experiment": "mine",
        "cell": {"seed": "0", "a": "1"},
        "spec": {"a": 1},
    }


def test_an_invalid_cell_is_recorded_once(tmp_path: Path) -> None:
    plan = plan_of(placement(tmp_path), [cell(a="1")], [Decoded(trial_id="one", error="no good")])
    for _ in range(2):
        record_invalid(plan, plan.trials[0])
    stored = plan.placement.study.read("one")
    assert stored is not None
    assert (stored.outcome.status, stored.outcome.message) == ("invalid", "no good")
    assert not (plan.placement.study.trials / "superseded").exists()


def test_a_cell_that_has_become_valid_is_no_longer_recorded_as_invalid(tmp_path: Path) -> None:
    place = placement(tmp_path)
    before = plan_of(
        place, [cell(a="1"), cell(a="2")], [Decoded(trial_id=x, error="no") for x in ("aa", "bb")]
    )
    place.study.write_info(study_info(before, command="", versions={}))
    for planned in before.trials:
        record_invalid(before, planned)
    after = plan_of(
        place,
        [cell(a="1"), cell(a="2")],
        [Decoded(trial_id="cc", spec={}), Decoded(trial_id="bb", error="no")],
    )
    forget_invalid(after)
    assert place.study.read("aa") is None
    assert place.study.read("bb") is not None


def test_a_foreign_record_under_this_id_is_not_taken_for_done(tmp_path: Path) -> None:
    place = placement(tmp_path)
    place.study.write(record("one"))
    place.study.record_path("one").rename(place.study.record_path("two"))
    assert look_up(place.study, "two", code=CODE).state == "new"


GOOD: Mapping[str, Any] = {
    "study": "mine",
    "results_dir": "results",
    "experiment": "default",
    "rerun": "none",
    "timeout_s": 10,
    "memory_limit_gib": None,
    "timing": "exclusive",
    "retries": 0,
}


def test_placement_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    place = Placement.of({**GOOD, "study": 12})
    assert place.study.path == tmp_path / "results" / "12"
    assert (place.timeout_s, place.memory_limit_gib) == (10.0, None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("study", None, "study=null"),
        ("study", "../x", "study='../x' is no study name"),
        ("results_dir", "", "results_dir="),
        ("experiment", ["a"], "experiment="),
        ("rerun", "maybe", "rerun=maybe is none of none, failed, stale, all"),
        ("timeout_s", 0, "timeout_s=0: it must be a number above 0, or null"),
        ("timeout_s", True, "timeout_s=True"),
        ("timeout_s", "1h", "timeout_s=1h"),
        ("memory_limit_gib", float("nan"), "memory_limit_gib=nan"),
        ("memory_limit_gib", float("inf"), "memory_limit_gib=inf"),
        ("timing", "alone", "timing=alone is none of exclusive, shared"),
        ("retries", -1, "retries=-1: it must be a whole number"),
        ("retries", True, "retries=True: it must be a whole number"),
    ],
)
def test_placement_refuses(key: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match="^" + message.replace("(", r"\(")):
        Placement.of({**GOOD, key: value})
