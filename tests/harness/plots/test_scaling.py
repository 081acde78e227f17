"""Single layers against the length, from records that were made up."""

import numpy as np
import pytest

from harness import aggregate
from harness.plots import draw_all, scaling, style
from tests.harness import factory

LENGTHS = (1024, 2048, 4096)
POWERS = {"ours": 1.0, "sdpa": 2.0, "transformers": 1.0}


def study(*, repeats=(0, 1), **settings):
    return [
        factory.layer(
            name,
            length,
            step_s=0.1 * (length / 1024) ** power * (1 + 0.1 * repeat),
            repeat=repeat,
            **settings,
        )
        for name, power in POWERS.items()
        for length in LENGTHS
        for repeat in repeats
    ]


def drawn(records):
    with style.theme():
        return scaling.draw(aggregate.table(records, study="s"))


def lines(axes):
    return {bars.get_label(): bars.lines[0] for bars in axes.containers}


def test_a_line_a_layer_on_logarithmic_axes_and_the_floor():
    (plot,) = drawn(study())
    assert plot.name == "scaling"
    time, memory = plot.figure.axes
    assert list(lines(time)) == list(lines(memory)) == ["ours", "SDPA", "transformers"]
    for axes in (time, memory):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1,024", "2,048", "4,096"]
    ours = lines(time)["ours"]
    assert ours.get_xdata().tolist() == list(LENGTHS)
    assert ours.get_ydata() == pytest.approx([100 * np.sqrt(1.1) * n / 1024 for n in LENGTHS])
    (floor,) = (line for line in time.lines if line.get_label() == "floor")
    assert floor.get_ydata() == pytest.approx([250.0] * 3)


def test_the_caption_has_the_fitted_exponents():
    (plot,) = drawn(study())
    assert "Time grows as length^k, fitted k: ours 1.00, SDPA 2.00, transformers 1.00." in plot.caption
    assert "Peak memory grows as length^k" in plot.caption
    assert "Crosses" not in plot.caption


def test_what_has_no_number_is_marked_with_the_reason():
    records = study()
    records[10:12] = [factory.failed(record) for record in records[10:12]]  # SDPA at 4096 tokens
    (plot,) = drawn(records)
    for axes in plot.figure.axes:
        assert [text.get_text() for text in axes.texts] == ["memory"]
        crosses = [line for line in axes.lines if line.get_marker() == "x"]
        assert [line.get_xdata() for line in crosses] == [[4096]]
        assert lines(axes)["SDPA"].get_xdata().tolist() == [1024, 2048]
    assert plot.caption.endswith("ended without a number, and why.")


def test_a_single_repeat_has_no_bars():
    (plot,) = drawn(study(repeats=(0,)))
    segments = plot.figure.axes[0].containers[0].lines[2][0].get_segments()
    assert all(np.ptp(segment[:, 1]) == 0 for segment in segments)


def test_other_settings_are_other_figures():
    plots = drawn([*study(attention__n_hashes=1), *study(attention__n_hashes=4)])
    assert [plot.name for plot in plots] == ["scaling-1", "scaling-2"]
    assert "n_hashes\xa04" in plots[1].title


def test_one_length_or_no_layers_are_no_figure():
    assert drawn([record for record in study() if record.cell["task.length"] == "1024"]) == []
    assert drawn(factory.sweep({"task.length": ["32", "64"]})) == []


def test_a_study_that_failed_as_a_whole_has_none():
    records = [factory.failed(record, status="timeout") for record in study()]
    plots = draw_all(aggregate.table(records, study="s"), records=records)
    assert [plot.name for plot in plots] == ["outcomes"]
