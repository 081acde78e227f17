import math

import pytest

from harness import aggregate
from harness.design import design_of
from harness.effects import COLUMNS, effects
from tests.harness import factory

LEVELS = {
    "attention.n_hashes": ["1", "2", "16"],
    "attention.n_buckets": ["4", "16"],
    "model.residual": ["plain", "reversible"],
    "seed": ["0", "1"],
}


@pytest.fixture(scope="module")
def records():
    return factory.sweep(LEVELS)


@pytest.fixture(scope="module")
def found(records):
    return effects(aggregate.table(records, study="s"))


def one(table, factor, level, metric, task="copy"):
    rows = table[
        (table["factor"] == factor)
        & (table["level"] == level)
        & (table["metric"] == metric)
        & (table["task"] == task)
    ]
    assert len(rows) == 1
    return rows.iloc[0]


def test_columns(found):
    assert tuple(found.columns) == COLUMNS
    assert COLUMNS[:10] == (
        "factor", "level", "against", "metric", "scale", "effect", "low", "high", "ratio", "n_pairs"
    )  # fmt: skip


def test_planted_points_of_accuracy_are_found(found):
    row = one(found, "attention.n_hashes", "16", "accuracy")
    assert row["scale"] == "points"
    assert row["low"] < 4 * factory.POINTS_PER_DOUBLING < row["high"]
    assert row["high"] - row["low"] < 1.0
    assert math.isnan(row["ratio"])
    buckets = one(found, "attention.n_buckets", "16", "accuracy")
    assert buckets["low"] < 20.0 < buckets["high"]


def test_planted_time_ratio_is_found(found):
    row = one(found, "attention.n_hashes", "2", "step_s")
    assert row["scale"] == "log_ratio"
    assert row["low"] < factory.TIME_PER_DOUBLING < row["high"]
    assert row["ratio"] == pytest.approx(1.6, rel=0.02)


def test_exact_memory_ratio_is_a_point(found):
    row = one(found, "model.residual", "reversible", "peak_alloc_bytes")
    assert row["effect"] == pytest.approx(factory.REVERSIBLE_MEMORY, abs=1e-6)
    assert row["high"] - row["low"] < 1e-6


def test_no_effect_is_told_as_none(found):
    row = one(found, "model.residual", "reversible", "accuracy")
    assert abs(row["effect"]) < 0.5
    assert row["low"] < 0.2


def test_levels_are_compared_with_the_smallest_number(found):
    rows = found[found["factor"] == "attention.n_hashes"]
    assert set(rows["against"]) == {"1"}
    assert list(dict.fromkeys(rows["level"])) == ["2", "16"]


def test_pairs_are_every_matched_cell(found):
    assert one(found, "attention.n_hashes", "2", "accuracy")["n_pairs"] == 2 * 2 * 2
    assert one(found, "model.residual", "reversible", "accuracy")["n_pairs"] == 3 * 2 * 2
    assert (found["n_lost"] == 0).all()


def test_words_are_compared_in_the_order_typed(records):
    table = effects(aggregate.table(records, study="s"), factors={"model.residual": ["reversible", "plain"]})
    assert set(table.loc[table["factor"] == "model.residual", "against"]) == {"reversible"}


def test_a_failed_trial_costs_its_pairs_and_is_told(records):
    broken = [factory.failed(records[0]), *records[1:]]
    table = effects(aggregate.table(broken, study="s"))
    row = one(table, "attention.n_hashes", "2", "accuracy")
    assert (row["n_pairs"], row["n_lost"]) == (7, 1)


def test_numbers_of_a_trial_that_did_not_finish_are_not_used(records):
    trials = aggregate.table(records, study="s")
    trials.loc[0, "outcome"] = "timeout"
    assert one(effects(trials), "attention.n_hashes", "2", "accuracy")["n_lost"] == 1


def test_unmatched_trials_make_no_pair():
    records = [
        factory.record({"attention.n_hashes": "1", "attention.n_buckets": "4", "seed": 0}),
        factory.record({"attention.n_hashes": "4", "attention.n_buckets": "16", "seed": 0}),
    ]
    table = effects(aggregate.table(records, study="s"))
    assert (table["n_pairs"] == 0).all()
    assert table["effect"].isna().all()


def test_a_confounded_setting_is_kept_equal_within_pairs():
    levels = {"attention.n_hashes": ["1", "4"], "seed": ["0"]}
    records = [*factory.sweep(levels, train__batch_size=16), *factory.sweep(levels, train__batch_size=64)]
    row = one(effects(aggregate.table(records, study="s")), "attention.n_hashes", "4", "tokens_per_s")
    assert row["n_pairs"] == 2
    assert row["ratio"] == pytest.approx(1.6**-2, rel=0.05)


def test_seeds_are_paired_not_crossed():
    levels = {"attention.n_hashes": ["1", "4"], "seed": ["0", "1"]}
    table = effects(aggregate.table(factory.sweep(levels)[:3], study="s"))
    assert one(table, "attention.n_hashes", "4", "accuracy")["n_pairs"] == 1


def test_tasks_are_never_mixed():
    levels = {"attention.n_hashes": ["1", "4"], "seed": ["0", "1", "2"]}
    copies = factory.sweep({"task": ["copy"], **levels}, task__length=256)
    records = [*factory.sweep({"task": ["text"], **levels}), *copies]
    table = effects(aggregate.table(records, study="s"))
    text = one(table, "attention.n_hashes", "4", "bits_per_byte", task="text")
    assert text["scale"] == "absolute"
    assert text["n_pairs"] == 3
    assert text["high"] < 0
    assert one(table, "attention.n_hashes", "4", "accuracy", task="copy")["n_pairs"] == 3
    assert table[(table["task"] == "text") & (table["metric"] == "accuracy")].empty
    itself = table[table["factor"] == "task"]
    assert set(itself["task"]) == {""}
    assert set(itself["scale"]) == {"log_ratio"}


def test_the_same_table_gives_the_same_intervals(records, found):
    assert effects(aggregate.table(records, study="s")).equals(found)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_trials_have_no_effects(records, count):
    table = effects(aggregate.table(records[:count], study="s"))
    assert table.empty
    assert tuple(table.columns) == COLUMNS


def test_settings_of_a_task_are_no_factors_beside_it():
    copy = factory.sweep({"task": ["copy"], "task.length": ["128"], "attention.n_hashes": ["1", "4"]})
    text = factory.sweep({"task": ["text"], "task.length": ["256"], "attention.n_hashes": ["1", "4"]})
    trials = aggregate.table([*copy, *text], study="s")
    assert [factor.name for factor in design_of(trials).factors] == ["task", "attention.n_hashes"]
    assert "task.length" in design_of(trials).followers
    # A step on 256 tokens says nothing on how dear the task is beside one on 128.
    assert set(effects(trials)["factor"]) == {"attention.n_hashes"}


def test_a_factor_without_a_single_pair_has_no_effect():
    one = factory.sweep({"attention.n_hashes": ["1"], "model.residual": ["plain"]})
    other = factory.sweep({"attention.n_hashes": ["4"], "model.residual": ["reversible"]})
    assert effects(aggregate.table([*one, *other], study="s")).empty
