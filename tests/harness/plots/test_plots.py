import re
import warnings
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from harness import aggregate, plots
from harness.metrics.catalogue import describe
from harness.plots import factor_curves, outcomes, pareto, style, time_shares, train_eval, training_curves
from harness.plots.plot import Plot
from harness.plots.units import axis_label, in_axis_units
from tests.harness import factory

LEVELS = {"attention.n_hashes": ["1", "4"], "model.residual": ["plain", "reversible"], "seed": ["0", "1"]}
TEXT = {"task": ["text"], "attention.n_hashes": ["1", "4"]}


@pytest.fixture(scope="module")
def records():
    return [*factory.sweep(LEVELS), *factory.sweep(TEXT)]


@pytest.fixture(scope="module")
def trials(records):
    return aggregate.table(records, study="s")


@pytest.fixture(scope="module")
def svg(trials, records, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    for plot in plots.draw_all(trials, records=records):
        style.save(plot.figure, folder=folder, name=plot.name)
    return {path.stem: path.read_text() for path in folder.glob("*.svg")}


def drawn(trials, records=()):
    return {plot.name: plot for plot in plots.draw_all(trials, records=records)}


class TestAll:
    def test_each_task_has_its_own_figures(self, trials, records):
        assert list(drawn(trials, records)) == [
            "pareto-copy",
            "pareto-text",
            "factor-copy-attention.n_hashes",
            "factor-copy-model.residual",
            "factor-text-attention.n_hashes",
            "train-eval-copy",
            "train-eval-text",
            "training-copy",
            "training-text",
            "time-copy",
            "time-text",
        ]

    def test_every_figure_has_words(self, trials, records):
        for plot in drawn(trials, records).values():
            assert plot.title
            assert plot.caption.endswith(".")
            assert len(plot.alt) > 20
            assert plot.task in ("copy", "text")

    def test_nothing_to_show_is_no_figure(self, records):
        assert drawn(aggregate.table([], study="s")) == {}
        single = aggregate.table(records[:1], study="s")
        assert list(drawn(single, records[:1])) == ["train-eval-copy", "training-copy", "time-copy"]
        broken = [factory.failed(record) for record in records[:4]]
        assert list(drawn(aggregate.table(broken, study="s"), broken)) == ["outcomes"]

    def test_matplotlib_is_left_as_it_was(self, trials, records):
        before = dict(mpl.rcParams)
        for plot in drawn(trials, records).values():
            assert isinstance(plot.figure, Figure)
        assert dict(mpl.rcParams) == before
        assert plt.get_fignums() == []

    def test_the_same_trials_give_the_same_files(self, trials, records, tmp_path):
        texts = []
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            plot = next(iter(pareto.draw(trials)))
            texts.append(style.save(plot.figure, folder=tmp_path / name, name="p"))
        assert texts[0] == texts[1]
        assert (tmp_path / "a" / "p.png").read_bytes() == (tmp_path / "b" / "p.png").read_bytes()


class TestFiles:
    def test_are_valid_with_text_as_text(self, svg):
        for name, text in svg.items():
            root = ElementTree.fromstring(text)
            words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
            assert len(words) > 5, name

    def test_have_colours_for_dark_pages(self, svg):
        for text in svg.values():
            assert "prefers-color-scheme: dark" in text
            for light in (style.INK, style.PAPER):
                assert f"fill: {light}" in text.split("</style>", 1)[1]

    def test_units_are_those_people_read(self, svg):
        words = svg["factor-copy-attention.n_hashes"]
        assert {"Accuracy (%)", "Peak memory (MiB)", "Throughput (tokens/s)"} <= set(
            re.findall(r">([^<>]+)</text>", words)
        )
        assert "Bits per byte" in svg["factor-text-attention.n_hashes"]
        assert "ms per step" in svg["time-copy"]


class TestPareto:
    def test_undominated(self):
        values = np.array([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [1.0, 1.0], [2.0, 1.9], [3.0, 1.0]])
        assert pareto.undominated(values).tolist() == [True, True, True, False, False, True]

    def test_front_is_of_means_over_seeds(self, trials):
        (copy, text) = pareto.fronts(trials)
        assert (copy.task, copy.quality, text.quality) == ("copy", "accuracy", "bits_per_byte")
        assert len(copy.cells) == 4
        assert set(copy.cells["n"]) == {2}
        assert (copy.cells["low"] < copy.cells["accuracy"]).all()
        # Numbers go by quality, best first: for bits per byte that is the lowest.
        assert text.cells["bits_per_byte"].is_monotonic_increasing
        assert copy.cells["accuracy"].is_monotonic_decreasing
        best = copy.cells[copy.cells["undominated"]]
        assert best["number"].tolist() == list(range(1, len(best) + 1))

    def test_failed_trials_are_no_points(self, records):
        broken = [factory.failed(records[0]), *records[1:8]]
        (front,) = pareto.fronts(aggregate.table(broken, study="s"))
        assert sorted(front.cells["n"]) == [1, 2, 2, 2]

    def test_many_undominated_settings_keep_their_ring_but_not_a_number(self):
        records = factory.sweep({"attention.n_hashes": [str(rounds) for rounds in range(1, 18)]})
        (front,) = pareto.fronts(aggregate.table(records, study="s"))
        assert int(front.cells["undominated"].sum()) > pareto.MAX_NUMBERED
        assert front.cells["number"].max() == pareto.MAX_NUMBERED

    def test_numbers_do_not_overlap(self):
        records = factory.sweep(
            {"attention.n_hashes": [str(rounds) for rounds in range(1, 13)], "seed": ["0", "1"]}
        )
        (plot,) = pareto.draw(aggregate.table(records, study="s"))
        plot.figure.canvas.draw()
        for axes in plot.figure.axes:
            boxes = [text.get_window_extent() for text in axes.texts]
            assert len(boxes) > 3
            for index, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[index + 1 :])


class TestFactorCurves:
    def test_a_line_for_each_matched_cell_and_the_mean(self, trials):
        plot = factory_plot(factor_curves.draw(trials), "factor-copy-attention.n_hashes")
        for axes in plot.figure.axes:
            thin = [line for line in axes.lines if line.get_linewidth() < 1]
            assert len(thin) == 4
        accuracy = plot.figure.axes[0]
        mean = next(line for line in accuracy.lines if line.get_marker() == "o")
        assert np.diff(mean.get_ydata()) == pytest.approx([2 * factory.POINTS_PER_DOUBLING], abs=0.7)
        assert "the 4 cells" in plot.caption

    def test_levels_are_ticks_in_order(self):
        records = factory.sweep({"attention.n_hashes": ["16", "2", "8"]})
        (plot,) = factor_curves.draw(aggregate.table(records, study="s"))
        assert [tick.get_text() for tick in plot.figure.axes[0].get_xticklabels()] == ["2", "8", "16"]

    def test_a_cell_with_a_failure_is_a_broken_line_outside_the_mean(self, records):
        broken = [factory.failed(records[0]), *records[1:8]]
        plot = factory_plot(
            factor_curves.draw(aggregate.table(broken, study="s")), "factor-copy-attention.n_hashes"
        )
        assert "the 3 cells" in plot.caption

    def test_trials_without_a_partner_are_no_figure(self):
        records = [
            factory.record({"attention.n_hashes": "1", "attention.n_buckets": "4", "seed": 0}),
            factory.record({"attention.n_hashes": "4", "attention.n_buckets": "16", "seed": 0}),
        ]
        assert factor_curves.draw(aggregate.table(records, study="s")) == []


class TestTrainEval:
    def test_rows_are_rounds_in_training_and_columns_at_evaluation(self, trials):
        copy, text = train_eval.grids(trials)
        assert copy.means.index.tolist() == ["1", "4"]
        assert copy.means.columns.tolist() == ["1", "2", "4", "8", "full", "random", "knock out"]
        assert copy.n_controls == 3
        assert copy.n_trials == (4, 4)
        assert copy.means.loc["4", "full"] == pytest.approx(0.99, abs=0.01)
        assert copy.means.loc["1", "knock out"] == pytest.approx(0.017, abs=0.01)
        assert text.quality == "bits_per_byte"

    def test_other_kinds_of_attention_have_a_row_of_their_own(self):
        records = factory.sweep({"attention": ["lsh", "full"], "attention.n_hashes": ["1", "16"]})
        (grid,) = train_eval.grids(aggregate.table(records, study="s"))
        assert grid.means.index.tolist() == ["1", "16", "full"]
        assert grid.n_trials == (1, 1, 2)

    def test_text_on_cells_can_be_read(self, trials):
        for plot in train_eval.draw(trials):
            axes = plot.figure.axes[0]
            colours = axes.collections[0].get_facecolor()
            for text, colour in zip(axes.texts, colours, strict=True):
                assert contrast(text.get_color(), colour) >= 4.5


class TestTrainingCurves:
    def test_one_panel_a_factor(self, trials, records):
        with style.theme():
            plot = factory_plot(training_curves.draw(trials, records=records), "training-copy")
        assert [axes.get_title(loc="left") for axes in plot.figure.axes] == [
            "attention.n_hashes",
            "model.residual",
        ]
        assert "8 of 8 trials" in plot.caption

    def test_what_is_not_finite_is_left_out(self):
        curve = {"train": {"step": [1.0, 2.0, 3.0], "loss": [4.0, float("nan"), 2.0]}}
        record = factory.record({"seed": 0})
        object.__setattr__(record, "series", curve)
        (plot,) = training_curves.draw(aggregate.table([record], study="s"), records=[record])
        assert plot.figure.axes[0].lines[0].get_ydata().tolist() == [4.0, 2.0]

    @pytest.mark.parametrize(
        "series", [{}, {"train": {"step": [1.0], "loss": []}}, {"train": {"loss": [1.0]}}]
    )
    def test_no_curve_no_figure(self, series):
        record = factory.record({"seed": 0})
        object.__setattr__(record, "series", series)
        assert training_curves.draw(aggregate.table([record], study="s"), records=[record]) == []


def test_time_shares_are_means_of_medians(trials):
    plot = factory_plot(time_shares.draw(trials), "time-copy")
    (axes,) = plot.figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "n_hashes 1",
        "n_hashes 4",
        "residual plain",
        "residual reversible",
    ]
    assert {"35 %", "55 %"} <= {text.get_text() for text in axes.texts}
    assert "n_hashes 1: forward" in plot.alt


class TestOutcomes:
    def test_nothing_where_all_went_well(self, trials):
        assert outcomes.draw(trials) == []

    def test_failures_are_named_in_their_cells(self, records):
        broken = list(records[:8])
        broken[0] = factory.failed(broken[0])
        broken[7] = factory.failed(broken[7], status="killed")
        (plot,) = outcomes.draw(aggregate.table(broken, study="s"))
        texts = [text.get_text() for text in plot.figure.axes[0].texts]
        assert sorted(texts) == ["killed 1/2", "memory 1/2", "ok 2/2", "ok 2/2"]
        assert plot.caption.startswith("6 ok, 1 out_of_memory, 1 killed.")

    def test_a_large_grid_shows_the_rows_that_failed(self):
        levels = {"attention.n_hashes": ["1", "2"], "attention.chunk_length": [str(n) for n in range(2, 62)]}
        records = factory.sweep(levels)
        records[7] = factory.failed(records[7], status="error")
        (plot,) = outcomes.draw(aggregate.table(records, study="s"))
        assert "Only 1 of 60 rows are shown: those with a failure." in plot.caption
        (axes,) = plot.figure.axes
        assert [label.get_text() for label in axes.get_yticklabels()] == ["chunk_length\xa09"]

    def test_every_outcome_has_a_readable_look(self):
        for fill, text in outcomes.LOOKS.values():
            assert contrast(text, mpl.colors.to_rgba(fill)) >= 4.5


def test_hostile_names_are_drawn_as_they_are(tmp_path):
    hostile = "<b>$x^{2$ \x1b[31m 中\u202e_&"
    record = factory.record({"seed": 0})
    record.spec["task"] = {"_target_": hostile}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plot in plots.draw_all(aggregate.table([record], study="s"), records=[record]):
            assert re.fullmatch(r"[\w.-]+", plot.name)
            text = style.save(plot.figure, folder=tmp_path, name=plot.name)
            ElementTree.fromstring(text)


def test_names_of_files_are_plain():
    plot = Plot(name="../../etc/<x>", section="s", title="t", caption="c.", alt="a", figure=Figure())
    assert plot.name == ".._.._etc_x_"


def test_units_of_axes():
    assert in_axis_units(0.5, unit="fraction") == 50
    assert in_axis_units(2.0**20, unit="bytes") == 1
    assert in_axis_units(3.0, unit="count") == 3
    assert axis_label(describe("step_s")) == "Step time (ms)"
    assert axis_label(describe("operators")) == "Operators per step"


def test_levels_have_looks_of_their_own():
    assert len(set(style.colours(6))) == len(set(style.markers(6))) == 6
    assert len(set(style.colours(12))) == 12
    assert len(style.markers(12)) == len(style.dashes(12)) == 12


def factory_plot(found, name):
    return next(plot for plot in found if plot.name == name)


def contrast(one, other):
    """WCAG's contrast of two colours."""

    def luminance(colour):
        channels = [
            value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
            for value in mpl.colors.to_rgb(colour)
        ]
        return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
