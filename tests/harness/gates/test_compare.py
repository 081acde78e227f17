import math
from dataclasses import replace

import pytest

from harness.gates.compare import compare, judge
from harness.gates.margins import Margin, read_margins
from harness.gates.side import trial_of
from harness.paths import conf_dir
from tests.harness import factory

LEVELS = {"attention.n_hashes": ["1", "4"], "seed": ["0", "1", "2"]}


@pytest.fixture(scope="module")
def margins():
    return read_margins(conf_dir() / "gate" / "ci.yaml")


@pytest.fixture(scope="module")
def baseline():
    return [trial_of(record) for record in factory.sweep(LEVELS)]


def shifted(trials, metric, by, *, only=None):
    """The same trials with one metric changed by that amount, in all or in one cell."""
    return [
        replace(trial, metrics={**trial.metrics, metric: trial.metrics[metric] + by})
        if only is None or trial.cell["attention.n_hashes"] == only
        else trial
        for trial in trials
    ]


def times(trials, metric, factor):
    return [
        replace(trial, metrics={**trial.metrics, metric: trial.metrics[metric] * factor}) for trial in trials
    ]


def verdicts(comparison, metric):
    return [entry.verdict for entry in comparison.verdicts if entry.metric == metric]


class TestJudge:
    MARGIN = Margin(kind="paired", scale="points", margin=1.0, equivalence=2.0)

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [
            (1.1, 5.0, "regressed"),
            (1.0, 5.0, "inconclusive"),
            (1.0, 1.0, "equivalent"),
            (-5.0, -1.1, "improved"),
            (-1.9, 1.9, "equivalent"),
            (-2.1, 1.9, "inconclusive"),
            (math.nan, math.nan, "inconclusive"),
            (-math.inf, math.inf, "inconclusive"),
        ],
    )
    def test_where_less_is_better(self, low, high, verdict):
        assert judge(low=low, high=high, margin=self.MARGIN, higher_is_better=False) == verdict

    @pytest.mark.parametrize(
        ("low", "high", "verdict"),
        [(-5.0, -1.1, "regressed"), (1.1, 5.0, "improved"), (-0.5, 0.5, "equivalent")],
    )
    def test_where_more_is_better(self, low, high, verdict):
        assert judge(low=low, high=high, margin=self.MARGIN, higher_is_better=True) == verdict


def test_the_same_trials_pass(baseline, margins):
    result = compare(baseline, baseline, margins=margins)
    assert result.exit_code == 0
    assert {entry.verdict for entry in result.verdicts} == {"equivalent"}
    assert result.changed == ()
    phases = {f"peak_alloc_bytes.{phase}" for phase in ("forward", "backward", "optimizer")}
    assert {entry.metric for entry in result.verdicts if entry.decides} == phases | {
        "peak_alloc_bytes",
        "saved_bytes",
        "flops",
        "operators",
        "accuracy",
    }


@pytest.mark.parametrize(
    ("metric", "factor", "verdict", "code"),
    [
        ("peak_alloc_bytes.backward", 1.01, "regressed", 1),
        ("peak_alloc_bytes", 1.005, "equivalent", 0),
        ("peak_alloc_bytes", 1.0051, "regressed", 1),
        ("saved_bytes", 1.004, "equivalent", 0),
        ("saved_bytes", 0.9, "improved", 0),
        ("flops", 1 + 1e-6, "regressed", 1),
        ("operators", 401 / 400, "regressed", 1),
        ("accuracy", 0.9, "regressed", 1),
        ("accuracy", 1.05, "improved", 0),
    ],
)
def test_planted_changes(baseline, margins, metric, factor, verdict, code):
    result = compare(times(baseline, metric, factor), baseline, margins=margins)
    assert set(verdicts(result, metric)) == {verdict}
    assert result.exit_code == code
    changed = {entry.metric for entry in result.verdicts if entry.verdict != "equivalent"}
    assert changed <= {metric}


def test_one_seed_that_grew_is_enough_where_numbers_are_exact(baseline, margins):
    current = [replace(baseline[0], metrics=times(baseline, "flops", 1.01)[0].metrics), *baseline[1:]]
    result = compare(current, baseline, margins=margins)
    assert sorted(verdicts(result, "flops")) == ["equivalent", "regressed"]


def test_a_gain_of_some_seeds_only_is_no_improvement(baseline, margins):
    current = [replace(baseline[0], metrics=times(baseline, "flops", 0.9)[0].metrics), *baseline[1:]]
    assert set(verdicts(compare(current, baseline, margins=margins), "flops")) == {"equivalent"}


class TestQuality:
    def test_a_steady_small_loss_within_the_margin_is_equivalent(self, baseline, margins):
        result = compare(shifted(baseline, "accuracy", -0.008), baseline, margins=margins)
        assert set(verdicts(result, "accuracy")) == {"equivalent"}

    def test_seeds_that_disagree_are_inconclusive(self, baseline, margins):
        current = [
            replace(trial, metrics={**trial.metrics, "accuracy": trial.metrics["accuracy"] + by})
            for trial, by in zip(baseline, (-0.06, 0.03, 0.0) * 2, strict=True)
        ]
        result = compare(current, baseline, margins=margins)
        assert set(verdicts(result, "accuracy")) == {"inconclusive"}
        assert result.exit_code == 5

    def test_one_seed_is_judged_by_its_evaluation_sample(self, baseline, margins):
        result = compare(shifted(baseline[:1], "accuracy", -0.10), baseline[:1], margins=margins)
        entry = next(entry for entry in result.verdicts if entry.metric == "accuracy")
        assert entry.verdict == "regressed"
        assert entry.low < -10 < entry.high
        assert entry.note == "1 seed: interval of the evaluation sample"

    def test_one_seed_cannot_tell_a_small_loss(self, baseline, margins):
        result = compare(shifted(baseline[:1], "accuracy", -0.015), baseline[:1], margins=margins)
        assert verdicts(result, "accuracy") == ["inconclusive"]

    def test_the_quality_of_the_task_decides(self, margins):
        side = [trial_of(record) for record in factory.sweep({"task": ["text"], "seed": ["0", "1", "2"]})]
        worse = shifted(shifted(side, "accuracy", -0.3), "bits_per_byte", 0.019)
        result = compare(worse, side, margins=margins)
        assert verdicts(result, "accuracy") == []
        assert verdicts(result, "bits_per_byte") == ["equivalent"]
        assert verdicts(
            compare(shifted(side, "bits_per_byte", 0.1), side, margins=margins), "bits_per_byte"
        ) == ["regressed"]

    def test_bits_of_one_seed_have_no_interval(self, margins):
        side = [trial_of(record) for record in factory.sweep({"task": ["text"]})]
        result = compare(shifted(side, "bits_per_byte", 0.1), side, margins=margins)
        entry = next(entry for entry in result.verdicts if entry.metric == "bits_per_byte")
        assert (entry.verdict, entry.note) == ("regressed", "1 seed: no interval")

    def test_nan_is_never_equivalent(self, baseline, margins):
        current = shifted(baseline, "accuracy", math.nan)
        assert set(verdicts(compare(current, baseline, margins=margins), "accuracy")) == {"inconclusive"}
        current = shifted(baseline, "flops", math.nan)
        assert set(verdicts(compare(current, baseline, margins=margins), "flops")) == {"inconclusive"}


class TestTiming:
    def test_is_shown_but_does_not_decide(self, baseline, margins):
        result = compare(times(baseline, "step_s", 3.0), baseline, margins=margins)
        assert set(verdicts(result, "step_s")) == {"regressed"}
        assert result.exit_code == 0

    def test_decides_when_asked(self, baseline, margins):
        current = times(baseline, "step_s", 3.0)
        assert compare(current, baseline, margins=margins, timing=True).exit_code == 1

    def test_few_seeds_get_the_spread_between_processes(self, baseline, margins):
        side = [trial for trial in baseline if trial.replicate == "seed 0"]
        entry = next(
            entry
            for entry in compare(side, side, margins=margins, timing=True).verdicts
            if entry.metric == "step_s"
        )
        assert entry.high == pytest.approx(math.expm1(1.96 * math.sqrt(2) * 0.08))

    def test_other_processor_is_incomparable_for_times_alone(self, baseline, margins):
        moved = [
            replace(trial, fingerprint={**trial.fingerprint, "cpu_model": "Other CPU"}) for trial in baseline
        ]
        assert compare(moved, baseline, margins=margins).exit_code == 0
        result = compare(moved, baseline, margins=margins, timing=True)
        assert result.exit_code == 3
        assert set(verdicts(result, "step_s")) == {"incomparable"}


class TestFingerprint:
    @pytest.mark.parametrize("name", ["torch", "threads", "cpu_capability", "device"])
    def test_another_machine_is_incomparable(self, baseline, margins, name):
        moved = [replace(trial, fingerprint={**trial.fingerprint, name: "other"}) for trial in baseline]
        result = compare(times(moved, "flops", 2.0), baseline, margins=margins)
        assert result.exit_code == 3
        entry = next(entry for entry in result.verdicts if entry.metric == "flops")
        assert entry.verdict == "incomparable"
        assert entry.note.startswith(f"{name} other, baseline ")
        assert entry.ratio == pytest.approx(2.0)
        assert math.isnan(entry.low)

    def test_threads_and_device_come_from_the_spec(self):
        trial = trial_of(factory.record({"seed": 0}, threads=7))
        assert trial.fingerprint["threads"] == "7"
        assert trial.fingerprint["device"] == "cpu"


class TestMissing:
    def test_a_trial_missing_on_either_side(self, baseline, margins):
        for result in (
            compare(baseline[1:], baseline, margins=margins),
            compare(baseline, baseline[1:], margins=margins),
        ):
            assert result.exit_code == 4
            assert verdicts(result, "outcome") == ["missing"]

    def test_a_whole_cell_missing(self, baseline, margins):
        result = compare(baseline[:3], baseline, margins=margins)
        assert result.exit_code == 4
        assert len(verdicts(result, "outcome")) == 3

    @pytest.mark.parametrize("side", ["current", "baseline"])
    def test_a_metric_missing_on_either_side(self, baseline, margins, side):
        poor = [
            replace(trial, metrics={name: value for name, value in trial.metrics.items() if name != "flops"})
            for trial in baseline
        ]
        sides = (poor, baseline) if side == "current" else (baseline, poor)
        result = compare(*sides, margins=margins)
        assert result.exit_code == 4
        entry = next(entry for entry in result.verdicts if entry.metric == "flops")
        assert entry.note == f"not measured in the {side} study for 3 of 3 seeds"

    def test_a_time_that_is_missing_does_not_decide(self, baseline, margins):
        poor = [
            replace(
                trial, metrics={name: value for name, value in trial.metrics.items() if name != "forward_s"}
            )
            for trial in baseline
        ]
        assert compare(poor, baseline, margins=margins).exit_code == 0

    @pytest.mark.parametrize(
        ("now", "before", "verdict", "code"),
        [
            ("out_of_memory", "ok", "missing", 4),
            ("killed", "ok", "missing", 4),
            ("error", "error", "missing", 4),
            ("out_of_memory", "out_of_memory", "equivalent", 0),
            ("timeout", "out_of_memory", "missing", 4),
            ("ok", "timeout", "improved", 0),
        ],
    )
    def test_outcomes(self, baseline, margins, now, before, verdict, code):
        current = [replace(baseline[0], outcome=now), *baseline[1:]]
        there = [replace(baseline[0], outcome=before), *baseline[1:]]
        result = compare(current, there, margins=margins)
        assert verdicts(result, "outcome") == [verdict]
        assert result.exit_code == code

    def test_nothing_on_either_side_is_no_pass(self, margins):
        assert compare([], [], margins=margins).exit_code == 4

    def test_unreadable_records_are_missing(self, baseline, margins):
        result = compare(baseline, baseline, margins=margins, unreadable=["x.json: not JSON"])
        assert result.exit_code == 4
        assert result.verdicts[0].note == "x.json: not JSON"


def test_changed_settings_are_listed_not_missing(margins):
    before = [trial_of(record) for record in factory.sweep(LEVELS, train__steps=200)]
    after = [trial_of(record) for record in factory.sweep(LEVELS, train__steps=300)]
    result = compare(after, before, margins=margins)
    assert verdicts(result, "outcome") == []
    assert {(entry.setting, entry.baseline, entry.current) for entry in result.changed} == {
        ("train.steps", "200", "300")
    }
    assert len(result.changed) == 2


def test_a_new_setting_is_told_as_such(baseline, margins):
    newer = [replace(trial, settings={**trial.settings, "model.novelty": 1}) for trial in baseline]
    (first, *_) = compare(newer, baseline, margins=margins).changed
    assert (first.setting, first.baseline, first.current) == ("model.novelty", "not there", "1")


def test_experiments_are_apart(baseline, margins):
    other = [replace(trial, experiment="other") for trial in baseline]
    assert compare(other, baseline, margins=margins).exit_code == 4


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"regressed", "missing", "incomparable", "inconclusive"}, 1),
        ({"missing", "incomparable", "inconclusive"}, 4),
        ({"incomparable", "inconclusive"}, 3),
        ({"inconclusive"}, 5),
        (set(), 0),
    ],
)
def test_precedence_of_exit_codes(baseline, margins, changes, code):
    current = list(baseline)
    if "inconclusive" in changes:
        for index, by in enumerate((-0.06, 0.03, 0.0)):
            trial = current[index]
            current[index] = replace(
                trial, metrics={**trial.metrics, "accuracy": trial.metrics["accuracy"] + by}
            )
    if "incomparable" in changes:
        current[3:] = [
            replace(trial, fingerprint={**trial.fingerprint, "torch": "1"}) for trial in current[3:]
        ]
    there = list(baseline)
    if "missing" in changes:
        there.append(replace(baseline[0], cell={"attention.n_hashes": "99"}))
    if "regressed" in changes:
        current[0] = times([current[0]], "flops", 2.0)[0]
    assert compare(current, there, margins=margins).exit_code == code


def test_the_worst_comes_first(baseline, margins):
    current = times(baseline, "flops", 2.0)[1:]
    order = [entry.verdict for entry in compare(current, baseline, margins=margins).verdicts if entry.decides]
    assert order == sorted(order, key=["regressed", "missing", "equivalent"].index)
