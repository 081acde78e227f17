"""How the trials ended, where some did not end well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness.design import design_of, level_texts
from harness.factors import sort_levels
from harness.formatting import NOTHING, cell_label, plain, short_name
from harness.plots import style
from harness.plots.plot import Plot
from harness.record import STATUSES

#: Fill and text of each outcome; the words are in the cells, so the colour is never alone.
LOOKS = {
    "ok": ("#c9e3d4", style.ON_LIGHT),
    "out_of_memory": ("#d55e00", style.ON_LIGHT),
    "timeout": ("#de8f05", style.ON_LIGHT),
    "diverged": ("#cc78bc", style.ON_LIGHT),
    "invalid": ("#b4bac1", style.ON_LIGHT),
    "error": ("#7a1f1f", style.ON_DARK),
    "killed": ("#33373d", style.ON_DARK),
}
_SHORT = {"out_of_memory": "memory"}
_MAX_ROWS = 40
_MAX_COLUMNS = 10


def draw(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Plot]:
    """The grid of outcomes; nothing if every trial went well."""
    if trials.empty or (trials["outcome"] == "ok").all():
        return []
    design = design_of(trials, factors=factors)
    names = sorted(design.cell_keys, key=lambda name: name != "task")
    texts = level_texts(trials, names)
    narrow = [factor for factor in design.factors if len(factor.levels) <= _MAX_COLUMNS]
    wide = max(narrow, key=lambda factor: len(factor.levels), default=None)
    others = [name for name in names if wide is None or name != wide.name]
    rows = pd.Series(
        [cell_label({name: row[name] for name in others}) or "all" for row in texts.to_dict("records")],
        index=trials.index,
    )
    columns = texts[wide.name] if wide else pd.Series("all", index=trials.index)
    levels = sort_levels(columns.unique(), typed=wide.levels if wide else ())
    ended_badly = (trials["outcome"] != "ok").groupby(rows).any()
    ranks = {name: {level: rank for rank, level in enumerate(sort_levels(texts[name]))} for name in others}
    order = list(
        dict.fromkeys(
            texts.assign(_row=rows).sort_values(
                others, key=lambda column: column.map(ranks[str(column.name)])
            )["_row"]
            if others
            else rows
        )
    )
    whole = len(order)
    if whole > _MAX_ROWS:
        order = [row for row in order if ended_badly[row]][:_MAX_ROWS]
    cells: dict[tuple[str, str], list[str]] = {}
    for row, column, outcome in zip(rows, columns, trials["outcome"], strict=True):
        cells.setdefault((row, column), []).append(outcome)
    figure = _grid(cells, rows=order, columns=levels, name=short_name(wide.name) if wide else "")
    counts = trials["outcome"].value_counts()
    told = ", ".join(f"{counts[status]} {status}" for status in STATUSES if status in counts.index)
    cut = f" Only {len(order)} of {whole} rows are shown: those with a failure." if len(order) < whole else ""
    return [
        Plot(
            name="outcomes",
            section="failures",
            title="How the trials ended",
            caption=f"{told}. A cell shows its worst outcome, and how many of its trials ended so.{cut}",
            alt=f"Grid of outcomes: {told}",
            figure=figure,
        )
    ]


def _grid(
    cells: Mapping[tuple[str, str], Sequence[str]], *, rows: Sequence[str], columns: Sequence[str], name: str
) -> Figure:
    severity = [*STATUSES[:1], "invalid", "diverged", "timeout", "out_of_memory", "error", "killed"]
    codes = np.full((len(rows), len(columns)), np.nan)
    texts = np.full(codes.shape, "", dtype=object)
    for place, row in enumerate(rows):
        for column, level in enumerate(columns):
            found = cells.get((row, level), [])
            if not found:
                continue
            worst = max(found, key=severity.index)
            codes[place, column] = severity.index(worst)
            count = f" {found.count(worst)}/{len(found)}" if len(found) > 1 else ""
            texts[place, column] = f"{_SHORT.get(worst, worst)}{count}"
    longest = max(len(row) for row in rows)
    figure = Figure(
        figsize=(min(14.0, 1.6 + 0.075 * min(longest, 90) + 1.05 * len(columns)), 1.7 + 0.34 * len(rows)),
        layout="constrained",
    )
    axes = figure.add_subplot()
    sns.heatmap(
        codes,
        ax=axes,
        mask=np.isnan(codes),
        cmap=ListedColormap([LOOKS[status][0] for status in severity]),
        norm=BoundaryNorm(np.arange(len(severity) + 1) - 0.5, len(severity)),
        cbar=False,
        linewidths=2,
        linecolor=style.PAPER,
        xticklabels=[plain(level, limit=16) for level in columns],
        yticklabels=[plain(row, limit=90) for row in rows],
    )
    for (row, column), text in np.ndenumerate(texts):
        if text:
            colour = LOOKS[severity[int(codes[row, column])]][1]
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=colour)
    for row, column in np.argwhere(np.isnan(codes)):
        axes.text(column + 0.5, row + 0.5, NOTHING, ha="center", va="center", fontsize=8, color=style.MUTED)
    axes.grid(visible=False)
    axes.tick_params(axis="both", length=0, rotation=0)
    axes.set_xlabel(name)
    seen = [status for code, status in enumerate(severity) if (codes == code).any()]
    figure.legend(
        handles=[Patch(color=LOOKS[status][0], label=status.replace("_", " ")) for status in seen],
        loc="outside lower center",
        ncols=len(seen),
    )
    return figure
