"""Where the time of a step goes: forward, backward, optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from harness.design import by_task, design_of, level_texts
from harness.formatting import plain, short_name
from harness.plots import style
from harness.plots.plot import Plot
from harness.wording import counted

PHASES = ("forward_s", "backward_s", "optimizer_s")
_MAX_BARS = 30


def draw(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Plot]:
    """One figure a task: a bar for each level of each factor, or one for all trials."""
    plots = []
    for task, part in by_task(trials):
        if not set(PHASES) <= set(part.columns):
            continue
        done = part[(part["outcome"] == "ok") & part[list(PHASES)].notna().all(axis="columns")]
        if not done.empty:
            plots.append(_draw(done, task=task, bars=_bars(done, part, factors=factors)))
    return plots


def _bars(
    done: pd.DataFrame, trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None
) -> pd.DataFrame:
    """Mean milliseconds of each phase, one row a level, labelled."""
    rows: dict[str, pd.Series[float]] = {}
    for factor in design_of(trials, factors=factors).factors:
        texts = level_texts(done, [factor.name])[factor.name]
        for level in factor.levels:
            chosen = done[texts == level]
            if not chosen.empty:
                rows[f"{short_name(factor.name)} {plain(level, limit=24)}"] = chosen[list(PHASES)].mean()
    if not rows:
        rows["all trials"] = done[list(PHASES)].mean()
    return pd.DataFrame(rows).T.head(_MAX_BARS) * 1000


def _draw(done: pd.DataFrame, *, task: str, bars: pd.DataFrame) -> Plot:
    figure, (axes,) = style.panels(1, width=8.2, height=1.5 + 0.36 * len(bars))
    total = bars.sum(axis="columns")
    left = pd.Series(0.0, index=bars.index)
    for phase, colour in zip(PHASES, style.COLOURS, strict=False):
        drawn = axes.barh(
            bars.index, bars[phase], left=left, height=0.72, color=colour, label=phase.removesuffix("_s")
        )
        shares = 100 * bars[phase] / total
        # A label needs room: none on a bar that is narrower than its digits.
        texts = [
            f"{share:.0f} %" if width > 0.045 * total.max() else ""
            for share, width in zip(shares, bars[phase], strict=True)
        ]
        axes.bar_label(drawn, labels=texts, label_type="center", fontsize=8, color=style.ON_LIGHT)
        left = left + bars[phase]
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms per step")
    style.legend_below(figure, axes)
    return Plot(
        name=f"time-{task}",
        section="time",
        task=task,
        title=f"Where the time goes ({plain(task, limit=40)})",
        caption=(
            "Medians within a trial, averaged over the finished trials that have the level "
            f"({counted(len(done), 'finished trial')} in all)."
        ),
        alt="; ".join(
            f"{label}: " + ", ".join(f"{phase.removesuffix('_s')} {row[phase]:.3g} ms" for phase in PHASES)
            for label, row in bars.iterrows()
        ),
        figure=figure,
    )
