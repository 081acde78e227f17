"""The train×eval grid: weights trained with some rounds, evaluated with others and under the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure

from harness.design import by_task, level_texts, quality_column
from harness.factors import as_number, sort_levels
from harness.formatting import plain
from harness.metrics.catalogue import describe
from harness.metrics.names import split_column
from harness.plots import style
from harness.plots.plot import Plot
from harness.plots.units import axis_label, in_axis_units

_ROUNDS = "attention.n_hashes"
_CONTROLS = ("full", "oracle", "random", "knock_out")
_MAX_ROWS = 24


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Mean quality by training setting (rows) and evaluation setting (columns).

    Args:
        n_trials: trials behind each row.
        n_controls: how many of the last columns are controls.
    """

    task: str
    quality: str
    means: pd.DataFrame
    n_trials: tuple[int, ...]
    n_controls: int


def grids(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Grid]:
    """The grid of each task that was evaluated under at least two settings."""
    found = []
    for task, part in by_task(trials):
        quality = quality_column(part)
        if quality is None:
            continue
        columns = _eval_columns(part, quality=quality)
        done = part[(part["outcome"] == "ok") & part[quality].notna()]
        if len(columns) < 2 or done.empty:
            continue
        rows = _row_labels(done)
        order = sort_levels(rows.unique(), typed=(factors or {}).get("attention", ()))[:_MAX_ROWS]
        means = done[list(columns)].groupby(rows).mean().loc[order].rename(columns=columns)
        counts = rows.value_counts()
        found.append(
            Grid(
                task=task,
                quality=quality,
                means=means,
                n_trials=tuple(int(counts[row]) for row in order),
                n_controls=sum("attention" in split_column(column)[2] for column in columns),
            )
        )
    return found


def draw(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Plot]:
    """One heatmap a task."""
    return [_draw(grid) for grid in grids(trials, factors=factors)]


def _eval_columns(trials: pd.DataFrame, *, quality: str) -> dict[str, str]:
    """Columns of the grid with their headings: rounds by number, then the controls."""
    rounds: list[tuple[float, str, str]] = []
    controls: list[tuple[float, str, str]] = []
    for column in trials.columns:
        metric, _, at = split_column(column)
        if metric != quality or trials[column].isna().all():
            continue
        if set(at) == {"n_hashes"}:
            rounds.append((as_number(at["n_hashes"]) or 0.0, column, at["n_hashes"]))
        elif set(at) == {"attention"}:
            name = at["attention"]
            rank = _CONTROLS.index(name) if name in _CONTROLS else len(_CONTROLS)
            controls.append((float(rank), column, name.replace("_", " ")))
    return {column: heading for _, column, heading in [*sorted(rounds), *sorted(controls)]}


def _row_labels(trials: pd.DataFrame) -> pd.Series[str]:
    """The training setting: rounds, and the kind of attention where it varies (only LSH has rounds)."""
    names = [name for name in ("attention", _ROUNDS) if name in trials.columns]
    texts = level_texts(trials, names)
    rounds = texts[_ROUNDS] if _ROUNDS in names else pd.Series("all", index=trials.index)
    if "attention" not in names or texts["attention"].nunique() == 1:
        return rounds
    return rounds.where(texts["attention"] == "lsh", texts["attention"])


def _draw(grid: Grid) -> Plot:
    metric = describe(grid.quality)
    values = in_axis_units(grid.means, unit=metric.unit).to_numpy(dtype=float)
    rows, columns = values.shape
    figure = Figure(figsize=(2.6 + 0.85 * columns, 1.5 + 0.5 * rows), layout="constrained")
    axes = figure.add_subplot()
    better_is_higher = metric.better == "higher"
    # One hue; white text on its dark end, black on its light one.
    palette = sns.color_palette("mako" if better_is_higher else "mako_r", as_cmap=True)
    limits = (0.0, 100.0) if metric.unit == "fraction" else (np.nanmin(values), np.nanmax(values))
    sns.heatmap(
        values,
        ax=axes,
        annot=_texts(values, fraction=metric.unit == "fraction"),
        fmt="",
        cmap=palette,
        vmin=limits[0],
        vmax=limits[1],
        linewidths=2,
        linecolor=style.PAPER,
        xticklabels=[plain(name, limit=16) for name in grid.means.columns],
        yticklabels=[
            f"{plain(name, limit=20)}  ({count})"
            for name, count in zip(grid.means.index, grid.n_trials, strict=True)
        ],
        cbar_kws={"label": axis_label(metric), "pad": 0.02},
    )
    fills = to_rgba_array(axes.collections[0].get_facecolor())
    for text, colour in zip(axes.texts, fills, strict=True):
        text.set_color(style.text_on(*colour[:3]))
    if 0 < grid.n_controls < columns:
        axes.axvline(columns - grid.n_controls, color=style.INK, linewidth=2)
    axes.tick_params(axis="both", length=0, rotation=0)
    axes.set_xlabel("evaluated with rounds" + (" | and under controls" if grid.n_controls else ""))
    axes.set_ylabel("trained with rounds (trials)")
    return Plot(
        name=f"train-eval-{grid.task}",
        section="train_eval",
        task=grid.task,
        title=f"Train × eval ({plain(grid.task, limit=40)})",
        caption=(
            "The same trained weights under other numbers of hash rounds, and with full attention, random "
            "buckets and no attention at all. Means over hash seeds and over all other settings."
        ),
        alt=f"Heatmap of {metric.label} on the task {grid.task} by rounds in training and at evaluation; "
        "the numbers are in the table below it",
        figure=figure,
    )


def _texts(values: np.ndarray, *, fraction: bool) -> np.ndarray:
    decimals = 1 if fraction else 2
    return np.array([["" if np.isnan(value) else f"{value:.{decimals}f}" for value in row] for row in values])
