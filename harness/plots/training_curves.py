"""Loss during training: each trial, and the mean at each level of a factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from numpy.typing import NDArray

from harness.design import Factor, by_task, design_of, level_texts
from harness.formatting import plain
from harness.plots import style
from harness.plots.plot import Plot
from harness.record import TrialRecord

#: Points a curve is averaged down to: more cannot be seen, and the noise between steps hides the trend.
_POINTS = 60
_MAX_LINES = 60
_MAX_PANELS = 6


def draw(
    trials: pd.DataFrame,
    *,
    records: Iterable[TrialRecord],
    factors: Mapping[str, Sequence[str]] | None = None,
) -> list[Plot]:
    """One figure a task: a panel for each factor, or one for all trials."""
    found = {record.trial_id: _curve(record.series.get("train", {})) for record in records}
    ids, curves = pd.Index(found), _in_one(list(found.values()))
    plots = []
    for task, part in by_task(trials):
        # For each point, the row of its trial among those of the task; -1 for trials of other tasks.
        rows = pd.Index(part["trial_id"]).get_indexer(ids)[curves["row"].to_numpy()]
        mine = curves.assign(row=rows)[rows >= 0]
        if mine["step"].nunique() > 1:
            swept = design_of(part, factors=factors).factors
            plots.append(_draw(part, curves=mine, task=task, factors=swept[:_MAX_PANELS]))
    return plots


def thinned(columns: Mapping[str, list[float]]) -> dict[str, list[float]]:
    """A curve of training with as many points as are drawn."""
    steps, losses = _curve(columns)
    return {"step": steps.tolist(), "loss": losses.tolist()}


def _curve(columns: Mapping[str, list[float]]) -> NDArray[np.float64]:
    """Steps and losses, each the mean of a bin; what is not finite is left out."""
    steps, losses = columns.get("step", []), columns.get("loss", [])
    if len(steps) != len(losses) or not steps:
        return np.empty((2, 0))
    data = np.array([steps, losses], dtype=float)
    n, n_bins = data.shape[1], min(_POINTS, data.shape[1])
    sizes = np.full(n_bins, n // n_bins)
    sizes[: n % n_bins] += 1
    means = np.add.reduceat(data, np.cumsum(sizes) - sizes, axis=1) / sizes
    return means[:, np.isfinite(means[1])]


def _in_one(curves: Sequence[NDArray[np.float64]]) -> pd.DataFrame:
    """All points of all curves; `row` tells which curve a point is of."""
    steps, losses = np.concatenate([np.empty((2, 0)), *curves], axis=1)
    rows = np.repeat(np.arange(len(curves)), [curve.shape[1] for curve in curves])
    return pd.DataFrame({"row": rows, "step": steps, "loss": losses})


def _draw(trials: pd.DataFrame, *, curves: pd.DataFrame, task: str, factors: Sequence[Factor]) -> Plot:
    texts = level_texts(trials, [factor.name for factor in factors])
    count = max(1, len(factors))
    columns = count if count < 4 else 2 if count == 4 else 3
    rows = -(-count // columns)
    figure, _ = style.panels(0, width=max(5.2, 3.5 * columns), height=3.2 * rows)
    first: Axes | None = None
    for index in range(count):
        axes = figure.add_subplot(rows, columns, index + 1, sharey=first)
        if factors:
            names = texts[factors[index].name].to_numpy(dtype=object)[curves["row"]]
            _panel(axes, curves=curves, factor=factors[index], names=names)
        else:
            _panel(axes, curves=curves)
        axes.set_ylabel("training loss (nats)" if index % columns == 0 else "")
        first = first or axes
    lines = curves["row"].nunique()
    return Plot(
        name=f"training-{task}",
        section="training",
        task=task,
        title=f"Training loss ({plain(task, limit=40)})",
        caption=(
            f"Thin lines: {min(lines, _MAX_LINES)} of {lines} trials. Thick lines: means over the trials at "
            "each level, with their 95 % interval."
        ),
        alt=f"Training loss against steps on the task {task}"
        + (f", by {', '.join(factor.name for factor in factors)}" if factors else ""),
        figure=figure,
    )


def _panel(
    axes: Axes,
    *,
    curves: pd.DataFrame,
    factor: Factor | None = None,
    names: NDArray[np.object_] | None = None,
) -> None:
    """Draw the curves of all trials, and their mean at each level.

    Args:
        names: the level of each point; all are one level without a factor.
    """
    rows = curves["row"].drop_duplicates().head(_MAX_LINES)
    for _, curve in curves[curves["row"].isin(rows)].groupby("row", sort=False):
        # Many lines on one place add up to a dark band that hides the means.
        axes.plot(
            curve["step"], curve["loss"], color=style.MUTED, alpha=1 / (2 + len(rows) ** 0.5), linewidth=0.7
        )
    levels = factor.levels if factor else ("all trials",)
    looks = zip(style.colours(len(levels)), style.dashes(len(levels)), strict=True)
    for level, (colour, dash) in zip(levels, looks, strict=True):
        chosen = curves if names is None else curves[names == level]
        if chosen.empty:
            continue
        at_step = chosen.groupby("step")["loss"]
        mean, half = at_step.mean(), 1.96 * at_step.sem()
        axes.plot(mean.index, mean, color=colour, linestyle=dash, label=plain(level, limit=20))
        if half.notna().any():
            axes.fill_between(mean.index, mean - half, mean + half, color=colour, alpha=0.2)
    axes.set_title(plain(factor.name, limit=32) if factor else "All trials")
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    if factor is None:
        return
    if len(levels) > 5:
        # So many names would cover the curves.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), handlelength=1.8, ncols=2, fontsize=8)
    else:
        axes.legend(loc="upper right", handlelength=1.8, fontsize=9)
