"""Layers beside each other, from records with planted times."""

import math
from dataclasses import replace

import numpy as np
import pytest

from harness import aggregate
from harness.comparison import comparisons, crossing, with_ratios
from harness.record import Sample
from tests.harness import factory

LENGTHS = (1024, 2048, 4096, 8192)
#: Seconds of forward and backward at 1024 tokens, and the power of the length that they grow by.
PLANTED = {"ours": (1.0, 1.0), "sdpa": (0.5, 2.0), "transformers": (4.0, 1.0), "reformer_pytorch": (3.0, 1.2)}


def seconds(implementation, length):
    start, power = PLANTED[implementation]
    return start * (length / 1024) ** power


def study(*, drift=(1.0, 1.5, 1.1), lengths=LENGTHS, **settings):
    """Every layer at every length in three repeats, each under a machine of another speed."""
    return [
        factory.layer(
            name,
            length,
            step_s=seconds(name, length) * slow,
            peak=2.0**20 * length / 1024 * (index + 1),
            repeat=repeat,
            **settings,
        )
        for repeat, slow in enumerate(drift)
        for length in lengths
        for index, name in enumerate(PLANTED)
    ]


def table(records):
    return aggregate.table(records, study="s")


def compared(records, **options):
    (one,) = comparisons(table(records), **options)
    return one


def row(comparison, layer, length):
    (found,) = (row for row in comparison.rows if (row.layer, row.length) == (layer, length))
    return found


class TestWorkloads:
    def test_layers_and_models_are_compared_apart(self):
        models = study(drift=(7.0,), workload="train_step.TrainStep")
        trials = table([*study(), *models])
        layer, model = comparisons(trials)
        assert (layer.words.subject, model.words.subject) == ("layer", "model")
        assert row(layer, "ours", 1024).values["ratio_to_best_peer"].n == 3
        assert row(model, "ours", 1024).values["ratio_to_best_peer"].n == 1
        assert row(model, "ours", 1024).values["step_s"].mean == pytest.approx(7.0)
        ratios = trials.groupby("workload")["ratio_to_best_peer"].count()
        assert ratios["attention"] == 3 * ratios["train_step"] > 0

    def test_what_else_a_model_of_an_implementation_is_does_not_set_it_apart(self):
        records = study(workload="train_step.TrainStep")
        for record in records:
            sdpa = record.cell["implementation"] == "sdpa"
            record.spec["model"]["residual"] = "plain" if sdpa else "reversible"
        one = compared(records)
        assert one.setting == {}
        assert one.layers == ["ours", "SDPA", "reformer_pytorch", "transformers"]


class TestRatios:
    def test_are_to_the_best_peer_of_the_same_block(self):
        trials = table(study())
        for name in PLANTED:
            part = trials[trials["implementation"] == name]
            for length, ratio in zip(part["task.length"], part["ratio_to_best_peer"], strict=True):
                best = min(seconds(peer, length) for peer in ("transformers", "reformer_pytorch"))
                assert ratio == pytest.approx(best / seconds(name, length))

    def test_are_of_forward_alone_too_and_to_sdpa(self):
        trials = table(study())
        assert trials["ratio_to_best_peer.forward"].tolist() == pytest.approx(
            trials["ratio_to_best_peer"].tolist()
        )
        ours = trials[trials["implementation"] == "ours"].groupby("task.length")["ratio_to_sdpa"].mean()
        assert ours.tolist() == pytest.approx([seconds("sdpa", n) / seconds("ours", n) for n in LENGTHS])

    def test_are_metrics_with_an_interval_in_the_summary(self):
        records = study()
        trials = table(records)
        summary = aggregate.summary(trials, records=records)
        rows = summary[(summary["metric"] == "ratio_to_best_peer") & (summary["implementation"] == "ours")]
        assert rows["mean"].tolist()[0] == pytest.approx(3.0)
        assert rows["n"].tolist() == [3] * len(LENGTHS)
        assert (rows["high"] - rows["low"]).max() < 1e-9

    def test_without_a_partner_there_is_none(self):
        trials = table(study(lengths=(1024,))[:2])  # ours and SDPA
        assert "ratio_to_best_peer" not in trials.columns
        assert trials["ratio_to_sdpa"].notna().all()
        lone = [record for record in study() if record.cell["implementation"] == "ours"]
        assert "ratio_to_sdpa" not in table(lone).columns

    def test_a_failed_partner_is_none(self):
        records = [
            factory.failed(record) if record.cell["implementation"] == "reformer_pytorch" else record
            for record in study(lengths=(1024,))
        ]
        trials = table(records).set_index("implementation")
        assert trials.loc["ours", "ratio_to_best_peer"].tolist() == pytest.approx([4.0] * 3)
        assert trials.loc["reformer_pytorch", "ratio_to_best_peer"].isna().all()

    def test_other_settings_are_other_partners(self):
        records = [
            *study(lengths=(1024,), attention__n_hashes=1),
            *(
                replace(record, samples=tuple(map(twice, record.samples)))
                for record in study(lengths=(1024,), attention__n_hashes=4)
                if record.cell["implementation"] != "ours"
            ),
            *(
                record
                for record in study(lengths=(1024,), attention__n_hashes=4)
                if record.cell["implementation"] == "ours"
            ),
        ]
        trials = table(records)
        ours = trials[trials["implementation"] == "ours"].groupby("attention.n_hashes")["ratio_to_best_peer"]
        assert ours.mean().to_dict() == {1: pytest.approx(3.0), 4: pytest.approx(6.0)}
        assert [one.setting for one in comparisons(trials)] == [
            {"attention.n_hashes": "1"},
            {"attention.n_hashes": "4"},
        ]

    def test_other_studies_are_left_as_they_are(self):
        records = factory.sweep({"attention.n_hashes": ["1", "4"]})
        trials = table(records)
        assert "ratio_to_best_peer" not in trials.columns
        assert with_ratios(trials) is trials
        assert comparisons(trials) == []
        assert comparisons(table([])) == []


def twice(sample):
    """The sample of a machine of half the speed."""
    return (
        replace(sample, values=tuple(2 * value for value in sample.values)) if sample.unit == "s" else sample
    )


class TestRows:
    def test_how_long_was_timed_does_not_tell_comparisons_apart(self):
        records = study()
        for index, record in enumerate(records):
            workload = {
                **record.spec["workload"],
                "timed_steps": 1 + index % 2,
                "budget_s": 0.5 * (index % 3),
            }
            records[index] = replace(record, spec={**record.spec, "workload": workload})
        assert compared(records).setting == {}

    def test_are_by_length_and_ours_first(self):
        comparison = compared(study())
        assert [(row.layer, row.length) for row in comparison.rows[:5]] == [
            ("ours", 1024),
            ("SDPA", 1024),
            ("reformer_pytorch", 1024),
            ("transformers", 1024),
            ("ours", 2048),
        ]
        assert comparison.layers == ["ours", "SDPA", "reformer_pytorch", "transformers"]
        assert comparison.setting == {}
        assert row(comparison, "ours", 1024).backends == ("flash",)

    def test_times_are_geometric_means_and_ratios_have_intervals_above_0(self):
        found = row(compared(study()), "ours", 2048).values
        assert found["step_s"].mean == pytest.approx(2 * (1.5 * 1.1) ** (1 / 3))
        assert found["ratio_to_best_peer"].mean == pytest.approx(3.0 * 2**0.2)
        assert found["share_of_floor"].mean == pytest.approx(0.25 / 2 * np.mean([1, 1 / 1.5, 1 / 1.1]))
        noisy = study(drift=(1.0,), lengths=(1024,)) + [
            record
            if record.cell["implementation"] != "ours"
            else replace(record, samples=tuple(map(twice, record.samples)))
            for record in study(drift=(1.0, 1.0), lengths=(1024,))
            if record.cell["repeat"] == "1"
        ]
        interval = row(compared(noisy), "ours", 1024).values["ratio_to_best_peer"]
        assert 0 < interval.low < interval.mean == pytest.approx(3 / math.sqrt(2))

    def test_a_failure_is_told(self):
        records = study()
        records[-1] = factory.failed(records[-1], status="timeout")
        comparison = compared(records)
        assert row(comparison, "reformer_pytorch", 8192).outcome == "timeout"
        assert row(comparison, "reformer_pytorch", 8192).values["step_s"].n == 2
        assert row(comparison, "reformer_pytorch", 4096).outcome == "ok"

    def test_invalid_trials_and_lone_layers_are_no_comparison(self):
        records = [
            record
            if record.cell["implementation"] == "ours"
            else factory.failed(record, status="invalid", message="odd")
            for record in study()
        ]
        assert comparisons(table(records)) == []


class TestCrossover:
    def test_is_where_the_planted_curves_cross(self):
        found = {(one.layer, one.metric): one for one in compared(study()).crossovers()}
        # L / 1024 = 0.5 (L / 1024)^2 at L = 2048; 4 L = 0.5 L^2 at 8; 3 L^1.2 = 0.5 L^2 at 6^(1/0.8).
        assert found["ours", "step_s"].at == pytest.approx(2048)
        assert found["ours", "forward_s"].at == pytest.approx(2048)
        assert found["transformers", "step_s"].at == math.inf
        assert found["ours", "step_s"].words == "2,050 tokens"
        assert found["transformers", "step_s"].words == "none in range (slower at 8,192 tokens)"
        assert "SDPA" not in {layer for layer, _ in found}

    def test_between_lengths_it_is_exact_for_powers(self):
        assert crossing([1000, 4000], np.log([2.0, 0.5])) == pytest.approx(2000)

    def test_what_is_faster_from_the_start_says_so(self):
        (one,) = [
            found
            for found in compared(study(lengths=(4096, 8192))).crossovers()
            if (found.layer, found.metric) == ("ours", "step_s")
        ]
        assert (one.at, one.words) == (4096, "none in range (faster from 4,096 tokens on)")

    @pytest.mark.parametrize(
        ("gaps", "at"),
        [
            ([1, -1, 1, -1], 2 ** 2.5),
            ([-1, -1, -1, -1], 1),
            ([-1, -1, -1, 0], math.inf),
            ([0, -1, -1, -1], 1),
            ([-1, 1, -1, -1], 2 ** 1.5),
        ],
    )  # fmt: skip
    def test_the_last_one_counts(self, gaps, at):
        assert crossing([1, 2, 4, 8], np.array(gaps, dtype=float)) == pytest.approx(at)

    def test_one_length_in_common_is_none(self):
        assert compared(study(lengths=(1024,))).crossovers() == []


def test_exponents_are_the_planted_ones():
    comparison = compared(study())
    for layer, name in (("ours", "ours"), ("SDPA", "sdpa"), ("reformer_pytorch", "reformer_pytorch")):
        assert comparison.exponent(layer, "step_s") == pytest.approx(PLANTED[name][1])
        assert comparison.exponent(layer, "peak_alloc_bytes") == pytest.approx(1.0)
    assert math.isnan(compared(study(lengths=(1024,))).exponent("ours", "step_s"))


def test_other_kinds_of_ours_are_layers_of_their_own_and_no_peers():
    local = [
        replace(
            record, spec={**record.spec, "attention": {**record.spec["attention"], "kind": "local"}}
        )
        for record in study(lengths=(1024,))
        if record.cell["implementation"] == "ours"
    ]  # fmt: skip
    records = [
        *(replace(record, trial_id=f"local{index}") for index, record in enumerate(local)),
        *(record for record in study(lengths=(1024,)) if record.cell["implementation"] == "ours"),
    ]
    (one,) = comparisons(table(records))
    assert one.layers == ["ours", "ours, local"]
    assert "ratio_to_best_peer" not in table(records).columns


def test_a_length_that_is_none_is_passed_over():
    records = study(lengths=(1024,))
    task = {**records[0].spec["task"], "length": "long"}
    records.append(replace(records[0], trial_id="odd", spec={**records[0].spec, "task": task}))
    assert {row.length for row in compared(records).rows} == {1024}


def test_a_sample_without_a_value_is_passed_over():
    records = study(lengths=(1024,))
    records[0] = replace(records[0], samples=(Sample(metric="step_s", unit="s", values=()),))
    assert row(compared(records), "ours", 1024).values["step_s"].n == 2
