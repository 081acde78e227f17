import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

import harness
from harness import aggregate
from harness.design import design_of, metric_columns, setting_columns
from harness.errors import UsageError
from tests.harness import factory

LEVELS = {"attention.n_hashes": ["1", "4"], "model.residual": ["plain", "reversible"], "seed": ["0", "1"]}


@pytest.fixture(scope="module")
def records():
    return factory.sweep(LEVELS)


@pytest.fixture(scope="module")
def trials(records):
    return aggregate.table(records, study="s", factors=LEVELS)


def test_one_row_a_trial_with_identity_settings_and_metrics(trials, records):
    assert len(trials) == len(records)
    names = list(trials.columns)
    settings = len(aggregate.IDENTITY)
    assert names[:settings] == list(aggregate.IDENTITY)
    assert names[settings : settings + 3] == ["attention.n_hashes", "model.residual", "seed"]
    assert set(trials["study"]) == {"s"}
    assert json.loads(trials["cell"].iloc[0]) == records[0].cell
    assert {"attention", "task", "task.length", "hashing", "workload", "train.lr"} <= set(names)
    assert not {"attention.kind", "task._target_"} & set(names)


def test_the_backend_that_ran_is_a_column_and_no_setting(records):
    ran = [replace(records[0], environment={"backend": "flash"}), replace(records[1], environment={})]
    table = aggregate.table(ran, study="s")
    assert table["backend"].tolist() == ["flash", ""]
    assert "backend" not in setting_columns(table)
    assert "backend" not in metric_columns(table)


def test_columns_have_the_narrowest_type(trials):
    assert trials["attention.n_hashes"].dtype == np.int64
    assert trials["train.lr"].dtype == float
    assert pd.api.types.is_string_dtype(trials["model.residual"])
    assert trials["accuracy"].dtype == float


def test_mixed_and_missing_levels():
    records = [
        factory.record({"seed": 0}, attention__n_buckets=[4, 8]),
        factory.record({"seed": 1}, attention__n_buckets=32, model__axial_shape=7),
        factory.record({"seed": 2}, attention__n_buckets=16),
    ]
    trials = aggregate.table(records, study="s")
    assert trials["attention.n_buckets"].tolist() == ["[4,8]", "32", "16"]
    assert trials["model.axial_shape"].dtype == "Int64"
    assert trials["model.axial_shape"].isna().tolist() == [True, False, True]


def test_integers_of_more_than_64_bits_in_records_from_elsewhere():
    records = [factory.record({"seed": 0}, threads=threads) for threads in (1, 10**23)]
    assert aggregate.table(records, study="s")["threads"].tolist() == [1.0, 1e23]


def test_a_swept_group_that_is_no_field_is_a_column():
    records = [
        replace(factory.record({"seed": 0}), cell={"model": name, "seed": 0}) for name in ("tiny", "small")
    ]
    trials = aggregate.table(records, study="s")
    assert trials["model"].tolist() == ["tiny", "small"]


def test_an_implementation_that_was_not_typed_is_the_one_that_ran():
    """A preset of one implementation beside one that sweeps them."""
    swept = [factory.layer(name, 64) for name in ("ours", "sdpa", "transformers")]
    bare = [replace(record, cell={"seed": "0"}) for record in swept]
    trials = aggregate.table([*swept, *bare], study="s")
    assert list(trials["implementation"]) == ["ours", "sdpa", "transformers"] * 2
    assert "implementation" not in aggregate.table(bare, study="s")


def test_failed_trials_are_rows_without_metrics(records):
    trials = aggregate.table([factory.failed(records[0]), records[1]], study="s")
    assert trials["outcome"].tolist() == ["out_of_memory", "ok"]
    assert math.isnan(trials["accuracy"].iloc[0])
    assert trials["attention.n_hashes"].iloc[0] == 1


def test_evaluation_settings_sort_by_number(trials):
    grid = [name for name in trials.columns if name.startswith("accuracy@n_hashes")]
    assert grid == [f"accuracy@n_hashes={rounds}" for rounds in (1, 2, 4, 8)]


def test_an_empty_study_is_an_empty_table():
    trials = aggregate.table([], study="s")
    assert list(trials.columns) == list(aggregate.IDENTITY)
    assert aggregate.summary(trials).empty
    assert aggregate.samples([]).columns.tolist() == list(aggregate.SAMPLE_COLUMNS)


def test_settings_and_metrics_are_told_apart_also_after_a_file(trials, tmp_path):
    trials.to_csv(tmp_path / "t.csv", index=False)
    read = pd.read_csv(tmp_path / "t.csv")
    assert setting_columns(read) == setting_columns(trials)
    assert metric_columns(read) == metric_columns(trials)


def test_tables_survive_parquet(trials, records, tmp_path):
    trials.drop(columns="model.axial_shape").to_parquet(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    pd.testing.assert_frame_equal(back, trials.drop(columns="model.axial_shape"))
    long = aggregate.samples(records)
    long.to_parquet(tmp_path / "s.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "s.parquet"), long)


def test_samples_keep_every_raw_value(records):
    long = aggregate.samples(records[:1])
    assert len(long) == sum(len(sample.values) for sample in records[0].samples)
    steps = long[long["metric"] == "step_s"]
    assert steps["value"].tolist() == list(records[0].values("step_s"))
    assert steps["index"].tolist() == list(range(len(steps)))
    assert {"correct@n_hashes=8,hash_seed=1", "correct"} <= set(long["metric"])
    assert set(long.loc[long["metric"] == "peak_alloc_bytes", "phase"]) == {
        "forward",
        "backward",
        "optimizer",
    }


class TestSummary:
    def test_means_over_seeds(self, trials):
        summary = aggregate.summary(trials)
        row = summary[
            (summary["attention.n_hashes"] == 4)
            & (summary["model.residual"] == "plain")
            & (summary["metric"] == "accuracy")
        ].iloc[0]
        mine = trials[(trials["attention.n_hashes"] == 4) & (trials["model.residual"] == "plain")]["accuracy"]
        assert row["n"] == 2
        assert row["mean"] == pytest.approx(mine.mean())
        assert row["sd"] == pytest.approx(mine.std())
        assert row["low"] < row["mean"] < row["high"]
        assert row["task"] == "copy"

    def test_one_seed_has_no_interval(self, records):
        summary = aggregate.summary(aggregate.table(records[:1], study="s"))
        assert summary["low"].isna().all()
        assert (summary["n"] == 1).all()

    def test_failures_are_counted(self, records):
        broken = [factory.failed(records[0]), *records[1:]]
        summary = aggregate.summary(aggregate.table(broken, study="s"))
        cell = summary[(summary["attention.n_hashes"] == 1) & (summary["model.residual"] == "plain")]
        assert set(cell["n_failed"]) == {1}
        assert set(cell["n"]) == {1}

    def test_spread_over_hash_seeds(self, trials, records):
        summary = aggregate.summary(trials, records=records).set_index("metric")
        assert (summary.loc["accuracy@n_hashes=4", "hash_seed_sd"] > 0).all()
        assert summary.loc["accuracy", "hash_seed_sd"].isna().all()


class TestDesign:
    def test_factors_are_swept_and_have_levels(self, trials):
        design = design_of(trials, factors=LEVELS)
        assert [(factor.name, factor.levels) for factor in design.factors] == [
            ("attention.n_hashes", ("1", "4")),
            ("model.residual", ("plain", "reversible")),
        ]
        assert design.blocks == design.followers == ()

    def test_what_a_kind_of_attention_brings_along_follows_it(self):
        records = [
            factory.record({"attention": "lsh", "seed": 0}, model__layers=["lsh"]),
            factory.record({"attention": "full", "seed": 0}, model__layers=["full"]),
        ]
        design = design_of(aggregate.table(records, study="s"))
        assert [factor.name for factor in design.factors] == ["attention"]
        assert design.followers == ("model.layers",)

    def test_what_differs_between_equal_cells_is_a_block(self):
        records = [*factory.sweep(LEVELS, train__steps=100), *factory.sweep(LEVELS, train__steps=200)]
        assert design_of(aggregate.table(records, study="s")).blocks == ("train.steps",)

    def test_invalid_trials_do_not_blur_it(self, records):
        odd = replace(factory.failed(records[0], status="invalid"), spec={"attention": {"n_hashes": 3}})
        trials = aggregate.table([*records, odd], study="s")
        design = design_of(trials)
        assert design.blocks == design.followers == ()

    def test_a_damaged_cell_column_is_survived(self, trials):
        assert design_of(trials.assign(cell="{")).factors == ()


class TestLoad:
    def test_from_a_folder_and_by_name(self, records, tmp_path):
        path = factory.store(tmp_path / "mine", records, factors=LEVELS)
        table = aggregate.load(path)
        assert set(table["trial_id"]) == {record.trial_id for record in records}
        pd.testing.assert_frame_equal(harness.load("mine", tmp_path), table)

    def test_levels_as_typed_come_first(self, records, tmp_path):
        path = factory.store(tmp_path / "mine", records, factors={"model.residual": ["plain"], **LEVELS})
        assert aggregate.load(path).columns[len(aggregate.IDENTITY)] == "model.residual"

    def test_a_torn_file_is_told_not_raised(self, records, tmp_path):
        path = factory.store(tmp_path / "mine", records)
        (path / "trials" / "deadbeef0000.json").write_text('{"schema')
        with pytest.warns(UserWarning, match=r"left out, not a record: deadbeef0000\.json: not JSON"):
            table = aggregate.load(path)
        assert len(table) == len(records)

    def test_no_study(self, tmp_path):
        with pytest.raises(UsageError, match="no study at"):
            aggregate.load(tmp_path / "nothing")

    @pytest.mark.parametrize("factors", [None, 3, ["a"], {"a": "b"}])
    def test_a_damaged_study_json_is_survived(self, factors):
        assert aggregate.typed_levels({"factors": factors}) == {}
