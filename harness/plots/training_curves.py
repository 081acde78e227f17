"""Loss during training: each trial, and the mean at each level of a factor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

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
    curves = pd.DataFrame(
        [
            {"trial_id": record.trial_id, "step": step, "loss": loss}
            for record in records
            for step, loss in _curve(record)
        ],
        columns=["trial_id", "step", "loss"],
    )
    plots = []
    for task, part in by_task(trials):
        mine = curves[curves["trial_id"].isin(part["trial_id"])]
        if mine["step"].nunique() > 1:
            swept = design_of(part, factors=factors).factors
            plots.append(_draw(part, curves=mine, task=task, factors=swept[:_MAX_PANELS]))
    return plots


def _curve(record: TrialRecord) -> list[tuple[float, float]]:
    """Steps and losses in bins; what is not finite is left out."""
    series = record.series.get("train", {})
    steps, losses = series.get("step", []), series.get("loss", [])
    if len(steps) != len(losses) or not steps:
        return []
    data = np.array([steps, losses], dtype=float)
    bins = np.array_split(data, min(_POINTS, data.shape[1]), axis=1)
    means = [(float(part[0].mean()), float(part[1].mean())) for part in bins]
    return [(step, loss) for step, loss in means if np.isfinite(loss)]


def _draw(trials: pd.DataFrame, *, curves: pd.DataFrame, task: str, factors: Sequence[Factor]) -> Plot:
    texts = level_texts(trials, [factor.name for factor in factors])
    texts["trial_id"] = trials["trial_id"]
    labelled = curves.merge(texts, on="trial_id")
    count = max(1, len(factors))
    columns = count if count < 4 else 2 if count == 4 else 3
    rows = -(-count // columns)
    figure, _ = style.panels(0, width=max(5.2, 3.5 * columns), height=3.2 * rows)
    first: Axes | None = None
    for index in range(count):
        axes = figure.add_subplot(rows, columns, index + 1, sharey=first)
        _panel(axes, curves=labelled, factor=factors[index] if factors else None)
        axes.set_ylabel("training loss (nats)" if index % columns == 0 else "")
        first = first or axes
    lines = curves["trial_id"].nunique()
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


def _panel(axes: Axes, *, curves: pd.DataFrame, factor: Factor | None) -> None:
    lines = list(curves.groupby("trial_id", sort=False))[:_MAX_LINES]
    for _, curve in lines:
        # Many lines on one place add up to a dark band that hides the means.
        axes.plot(
            curve["step"], curve["loss"], color=style.MUTED, alpha=1 / (2 + len(lines) ** 0.5), linewidth=0.7
        )
    levels = factor.levels if factor else ("all trials",)
    names = pd.Series("all trials", index=curves.index) if factor is None else curves[factor.name]
    looks = zip(style.colours(len(levels)), style.dashes(len(levels)), strict=True)
    for level, (colour, dash) in zip(levels, looks, strict=True):
        chosen = curves[names == level]
        if chosen.empty:
            continue
        sns.lineplot(
            data=chosen,
            x="step",
            y="loss",
            ax=axes,
            color=colour,
            linestyle=dash,
            label=plain(level, limit=20),
            errorbar=("se", 1.96),
            legend=False,
        )
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
