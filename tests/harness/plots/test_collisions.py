"""Collision curves and the table of hash families, from records that were made up."""

from dataclasses import replace

import numpy as np
import pytest

from harness import aggregate
from harness.metrics.catalogue import describe
from harness.plots import collisions, style
from harness.record import Sample
from harness.report.sections import _family_table
from tests.harness import factory

POINTS = {"angle": [0.0, np.pi / 2, np.pi], "flip_rate": [0.0, 0.5, 1.0]}


def measured(family, *, rates=(1.0, 0.25, 0.0), distance="angle", seed=0, n_buckets="16", **fields):
    """A record of the workload `hashing`."""
    done = factory.record({"hashing": family, "seed": seed})
    target = "".join(word.capitalize() for word in family.split("_"))
    curve = {"distance": POINTS[distance], "rate": list(rates), "standard_error": [0.0, 0.01, 0.0]}
    if family != "codeword":
        curve["theory"] = [1.0, 0.24, 0.0]
    return replace(
        done,
        trial_id=f"{family}-{seed}-{n_buckets}-{fields}",
        spec={
            **done.spec,
            "hashing": {"_target_": f"reformer.hashing.{family}.{target}", **fields},
            "workload": {"_target_": "harness.workloads.hashing.Hashing"},
        },
        samples=(
            Sample(metric="recall", unit="fraction", values=(0.25, 0.5, 0.75)),
            Sample(metric="bucket_entropy_bits", unit="bits", values=(3.5,)),
        ),
        series={"collision": curve},
        theory={"distance": distance, "n_buckets": n_buckets, "d_head": 16.0},
    )


def drawn(records, **factors):
    trials = aggregate.table(records, study="s")
    with style.theme():
        return collisions.draw(trials, records=records, factors=factors)


def marks(axes):
    """The measured points of each family, by its label."""
    return {
        bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in axes.containers if bars.has_yerr
    }


def test_nothing_where_no_family_was_measured_alone():
    assert drawn([factory.record({"seed": 0})]) == []
    assert collisions.families(aggregate.table([factory.record({"seed": 0})], study="s")) == []


def test_a_panel_for_each_measure_of_distance():
    plots = drawn(
        [measured("hyperplane"), measured("cross_polytope"), measured("codeword", distance="flip_rate")],
        hashing=["cross_polytope", "hyperplane", "codeword"],
    )
    (plot,) = plots
    assert plot.name == "collisions-16-16"
    assert "16 buckets, heads of 16" in plot.title
    by_angle, by_flips = plot.figure.axes
    assert list(marks(by_angle)) == ["cross_polytope", "hyperplane"]
    assert marks(by_angle)["hyperplane"] == [[0, 100], [90, 25], [180, 0]]
    assert marks(by_flips) == {"codeword": [[0, 100], [50, 25], [100, 0]]}


def test_a_closed_form_is_a_solid_line_and_marks_are_joined_where_there_is_none():
    (plot,) = drawn([measured("hyperplane"), measured("codeword", distance="flip_rate")])
    solid, dotted = (axes.lines[0] for axes in plot.figure.axes)
    assert (solid.get_linestyle(), solid.get_ydata().tolist()) == ("-", [100, 24, 0])
    assert (dotted.get_linestyle(), dotted.get_ydata().tolist()) == (":", [100, 25, 0])


def test_seeds_of_a_family_are_pooled_and_its_fields_tell_it_apart():
    records = [
        measured("syndrome", row_weight=None),
        measured("syndrome", row_weight=None, rates=(1.0, 0.35, 0.2), seed=1),
        measured("syndrome", row_weight=2),
        measured("cross_polytope", data_rotation=False),
    ]
    (plot,) = drawn(records)
    found = marks(plot.figure.axes[0])
    assert set(found) == {"syndrome", "syndrome, row_weight 2", "cross_polytope"}
    assert found["syndrome"] == [[0, 100], [90, pytest.approx(30)], [180, pytest.approx(10)]]
    bars = next(bars for bars in plot.figure.axes[0].containers if bars.get_label() == "syndrome")
    low, high = bars.lines[2][0].get_segments()[1][:, 1]
    assert high - low == pytest.approx(2 * 100 * 0.01 / np.sqrt(2))


def test_other_buckets_are_another_figure():
    plots = drawn([measured("hyperplane"), measured("hyperplane", n_buckets="4×4")])
    assert [plot.name for plot in plots] == ["collisions-16-16", "collisions-4_4-16"]


@pytest.mark.parametrize(
    ("series", "theory"),
    [
        ({}, {"distance": "angle"}),
        ({"collision": {"distance": [0.0], "rate": []}}, {"distance": "angle"}),
        ({"collision": {"distance": [0.0], "rate": [1.0], "standard_error": [0.0]}}, {"distance": "miles"}),
    ],
)
def test_what_is_no_curve_is_left_out(series, theory):
    assert drawn([replace(measured("hyperplane"), series=series, theory=theory)]) == []


def test_families_stand_beside_the_trials_trained_with_them():
    trained = [
        replace(
            factory.record({"hashing": "syndrome", "seed": seed}),
            spec={
                **factory.spec(seed=seed),
                "hashing": {"_target_": "reformer.hashing.Syndrome", "row_weight": None},
            },
        )
        for seed in (0, 1)
    ]
    records = [measured("syndrome", row_weight=None), measured("codeword", distance="flip_rate"), *trained]
    trials = aggregate.table(records, study="s")
    (found,) = collisions.families(trials, factors={"hashing": ["codeword", "syndrome"]})
    assert (found.task, found.keys) == ("copy", ())
    assert found.means["family"].tolist() == ["codeword", "syndrome"]
    syndrome = found.means.iloc[1]
    assert syndrome["recall"] == 0.5
    assert syndrome["accuracy"] == pytest.approx(trials["accuracy"].mean())

    table = _family_table(found)
    assert table.headers[:2] == ("family", "recall")
    assert [row[0].text for row in table.rows] == ["codeword", "syndrome"]
    place = table.headers.index(describe("accuracy").label)
    assert (table.rows[0][place].text, table.rows[0][place].value) == ("–", None)


def test_what_else_was_swept_is_told_apart():
    records = [
        replace(
            measured("hyperplane"),
            trial_id=rounds,
            cell={"hashing": "hyperplane", "attention.n_hashes": rounds},
            spec={**measured("hyperplane").spec, "attention": {"kind": "lsh", "n_hashes": int(rounds)}},
        )
        for rounds in ("1", "4")
    ]
    (found,) = collisions.families(aggregate.table(records, study="s"))
    assert found.keys == ("attention.n_hashes",)
    assert found.means["attention.n_hashes"].tolist() == ["1", "4"]
    assert _family_table(found).headers[:3] == ("family", "n_hashes", "recall")
