"""Quality, memory and throughput against each swept factor, other things being equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from harness.design import Factor, by_task, design_of, quality_column
from harness.effects import match_keys, matched
from harness.formatting import plain, short_name
from harness.metrics.catalogue import describe
from harness.plots import style
from harness.plots.plot import Plot
from harness.plots.units import axis_label, in_axis_units
from harness.statistics import from_first
from harness.wording import counted

#: More lines than this would be a grey wall: the rest is in the mean.
_MAX_LINES = 100


def draw(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Plot]:
    """One figure for each task and swept factor."""
    plots = []
    for task, part in by_task(trials):
        design = design_of(part, factors=factors)
        for factor in design.factors:
            keys = match_keys(part, factor=factor, cell_keys=design.cell_keys)
            plot = _draw(part, task=task, factor=factor, keys=keys)
            if plot is not None:
                plots.append(plot)
    return plots


def _draw(trials: pd.DataFrame, *, task: str, factor: Factor, keys: Sequence[str]) -> Plot | None:
    wanted = [quality_column(trials), "peak_alloc_bytes", "tokens_per_s"]
    tables = {}
    for name in wanted:
        if name is None or name not in trials.columns:
            continue
        cells = matched(trials, factor=factor, keys=keys, metric=name)
        # Numbers that are in no pair would be dots without a meaning.
        if (cells.notna().sum(axis="columns") > 1).any():
            tables[name] = in_axis_units(cells, unit=describe(name).unit)
    if not tables:
        return None
    figure, all_axes = style.panels(len(tables), width=3.3 * len(tables))
    complete = [
        _panel(axes, cells=cells, factor=factor, name=name)
        for axes, (name, cells) in zip(all_axes, tables.items(), strict=True)
    ]
    words = [describe(name).label for name in tables]
    fractions = any(describe(name).unit == "fraction" for name in tables)
    return Plot(
        name=f"factor-{task}-{factor.name}",
        section="factors",
        task=task,
        title=f"{plain(factor.name, limit=60)} ({plain(task, limit=40)})",
        caption=(
            f"Thin lines: trials equal in everything but {plain(factor.name, limit=60)} (a cell). "
            f"{_thick_line(min(complete), first=plain(factor.levels[0], limit=16), fractions=fractions)}"
        ),
        alt=f"{', '.join(words)} on the task {task} at {factor.name} = {', '.join(factor.levels)}",
        figure=figure,
    )


def _thick_line(complete: int, *, first: str, fractions: bool) -> str:
    if complete == 0:
        return "No cell is measured at every level, hence no mean."
    cut = ", cut at 0 and 100 %" if fractions else ""
    bars = (
        "one cell has no interval"
        if complete == 1
        else (f"bars: 95 % interval of the difference from {first} within cells{cut}")
    )
    return f"Thick line: mean of the {counted(complete, 'cell')} measured at every level; {bars}."


def _panel(axes: Axes, *, cells: pd.DataFrame, factor: Factor, name: str) -> int:
    """Draw one metric; hands back how many cells have it at every level."""
    metric = describe(name)
    positions = np.arange(len(factor.levels))
    values = cells.to_numpy(dtype=float)
    if len(values):
        lines = values[:_MAX_LINES].T
        axes.plot(positions, lines, color=style.MUTED, alpha=0.35, linewidth=0.9, marker=".", markersize=4)
    whole = values[np.isfinite(values).all(axis=1)]
    if len(whole):
        means, low, high = from_first(whole)
        if metric.unit == "fraction":
            # In per cent on this axis; no mean of accuracies lies outside.
            low, high = np.clip(low, 0, 100), np.clip(high, 0, 100)
        axes.errorbar(
            positions,
            means,
            yerr=np.stack([means - low, high - means]),
            color=style.COLOURS[0],
            marker="o",
            markersize=6,
            capsize=3,
            markeredgecolor=style.PAPER,
            zorder=3,
        )
    labels = [plain(level, limit=24) for level in factor.levels]
    axes.set_xticks(positions, labels)
    if len(factor.levels) * max(len(level) for level in factor.levels) > 28:
        axes.set_xticks(axes.get_xticks(), labels, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_xlim(-0.35, len(positions) - 0.65)
    axes.set_xlabel(short_name(factor.name))
    axes.set_title(axis_label(metric))
    axes.grid(visible=False, axis="x")
    if metric.unit != "fraction" and metric.unit != "bits":
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.10g}"))
    return len(whole)
