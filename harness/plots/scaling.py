"""Time and peak memory of a layer or a training step against the length, a line an implementation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from harness.comparison import OURS, Comparison, Row, comparisons
from harness.formatting import cell_label, plain
from harness.metrics.catalogue import describe
from harness.plots import style
from harness.plots.plot import Plot
from harness.plots.units import axis_label, in_axis_units

_PANELS = ("step_s", "peak_alloc_bytes")
_FAILED = {"out_of_memory": "memory", "timeout": "time"}


def draw(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Plot]:
    """One figure for each group of layers that were measured at two lengths or more."""
    found = [
        one
        for one in comparisons(trials, factors=factors)
        if len({row.length for row in one.rows if "step_s" in row.values}) > 1
    ]
    return [_draw(one, number=number if len(found) > 1 else None) for number, one in enumerate(found, 1)]


def _draw(comparison: Comparison, *, number: int | None) -> Plot:
    panels = [name for name in _PANELS if any(name in row.values for row in comparison.rows)]
    figure, all_axes = style.panels(len(panels), width=4.8 * len(panels), height=3.9)
    for axes, column in zip(all_axes, panels, strict=True):
        _panel(axes, comparison=comparison, column=column)
    style.legend_below(figure, all_axes[0])
    setting = plain(cell_label(comparison.setting), limit=100)
    lengths = sorted({row.length for row in comparison.rows})
    return Plot(
        name="scaling" if number is None else f"scaling-{number}",
        section="peers",
        title=f"{comparison.words.title} by length{f' ({setting})' if setting else ''}",
        caption=" ".join(
            [
                "Both axes are logarithmic; bars are 95 % intervals over the repeats.",
                *_floor(comparison),
                *(_exponents(comparison, column=column) for column in panels),
                *_failures(comparison),
            ]
        ),
        alt=(
            f"Time and peak memory of {', '.join(comparison.layers)} from {lengths[0]:,} to "
            f"{lengths[-1]:,} tokens"
        ),
        figure=figure,
    )


def _panel(axes: Axes, *, comparison: Comparison, column: str) -> None:
    metric = describe(column)
    layers = comparison.layers
    looks = zip(style.colours(len(layers)), style.markers(len(layers)), strict=True)
    for place, (layer, (colour, marker)) in enumerate(zip(layers, looks, strict=True)):
        rows = [row for row in comparison.rows if row.layer == layer and column in row.values]
        means = [in_axis_units(row.values[column].mean, unit=metric.unit) for row in rows]
        axes.errorbar(
            [row.length for row in rows],
            means,
            yerr=[_bars(rows, column, end, unit=metric.unit) for end in ("low", "high")],
            color=colour,
            marker=marker,
            markersize=5,
            markeredgecolor=style.PAPER,
            capsize=2,
            elinewidth=1,
            label=plain(layer, limit=40),
        )
        _mark_failures(axes, comparison=comparison, layer=layer, colour=colour, height=0.97 - 0.06 * place)
    floor = comparison.curve(OURS, "floor_s") if column == "step_s" else {}
    if floor:
        values = [in_axis_units(value, unit="s") for value in floor.values()]
        axes.plot(list(floor), values, color=style.MUTED, linestyle=":", linewidth=1.4, label="floor")
    _logarithmic(axes, lengths=sorted({row.length for row in comparison.rows}))
    time = f"{comparison.words.column[0].upper()}{comparison.words.column[1:]} (ms)"
    axes.set_title(time if column == "step_s" else axis_label(metric))


def _bars(rows: Sequence[Row], column: str, end: str, *, unit: str) -> list[float]:
    """Lengths of the bars to one end of the interval; none where there is no interval."""
    ends = [abs(getattr(row.values[column], end) - row.values[column].mean) for row in rows]
    return [in_axis_units(value if math.isfinite(value) else 0.0, unit=unit) for value in ends]


def _mark_failures(axes: Axes, *, comparison: Comparison, layer: str, colour: str, height: float) -> None:
    """A cross at the upper edge for every length at which the layer has no number."""
    for row in comparison.rows:
        if row.layer == layer and row.outcome != "ok" and "step_s" not in row.values:
            axes.plot(
                [row.length],
                [height],
                color=colour,
                marker="x",
                linestyle="none",
                transform=axes.get_xaxis_transform(),
            )
            axes.annotate(
                _FAILED.get(row.outcome, row.outcome),
                (row.length, height),
                xycoords=axes.get_xaxis_transform(),
                xytext=(-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                color=colour,
            )


def _logarithmic(axes: Axes, *, lengths: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    if len(lengths) > 5:
        axes.tick_params(axis="x", rotation=35)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.10g}"))
    axes.set_xlabel("tokens")


def _floor(comparison: Comparison) -> list[str]:
    there = bool(comparison.curve(OURS, "floor_s"))
    return ["Dotted: the floor of ours, what its matrix products alone would take."] if there else []


def _exponents(comparison: Comparison, *, column: str) -> str:
    fitted = {layer: comparison.exponent(layer, column) for layer in comparison.layers}
    told = [f"{plain(layer, limit=40)} {k:.2f}" for layer, k in fitted.items() if math.isfinite(k)]
    what = "Time" if column == "step_s" else "Peak memory"
    return f"{what} grows as length^k, fitted k: {', '.join(told)}."


def _failures(comparison: Comparison) -> list[str]:
    missing = any(row.outcome != "ok" and "step_s" not in row.values for row in comparison.rows)
    return ["Crosses at the upper edge: ended without a number, and why."] if missing else []
