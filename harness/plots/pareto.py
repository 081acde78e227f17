"""Quality against memory and against throughput: what is worth choosing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from harness.design import Design, by_task, cell_numbers, design_of, level_texts, quality_column
from harness.formatting import cell_label, plain
from harness.metrics.catalogue import describe
from harness.plots import style
from harness.plots.plot import Plot
from harness.plots.units import axis_label, in_axis_units
from harness.statistics import t_interval

COSTS = ("peak_alloc_bytes", "tokens_per_s")
#: Undominated settings that get a number; beyond, only their ring.
MAX_NUMBERED = 12
#: About the size of the axes, and how near points are drawn as one, in points of print.
_WIDTH, _HEIGHT, _TOUCHING = 290.0, 235.0, 9.0


@dataclass(frozen=True, kw_only=True)
class Front:
    """Settings of one task with their means over seeds.

    Args:
        cells: one row a setting: its levels, the means, `low` and `high` of the quality, `n` seeds,
            `undominated`, and `number` (0 for those without).
    """

    task: str
    quality: str
    costs: tuple[str, ...]
    design: Design
    cells: pd.DataFrame


def fronts(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Front]:
    """The Pareto front of each task over quality, peak memory and throughput."""
    found = []
    for task, part in by_task(trials):
        quality = quality_column(part)
        costs = tuple(name for name in COSTS if name in part.columns and part[name].notna().any())
        if quality is None or not costs:
            continue
        done = part[(part["outcome"] == "ok") & part[[quality, *costs]].notna().all(axis="columns")]
        if done.empty:
            continue
        design = design_of(part, factors=factors)
        found.append(
            Front(
                task=task,
                quality=quality,
                costs=costs,
                design=design,
                cells=_cells(done, design, quality, costs),
            )
        )
    return found


def draw(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Plot]:
    """One figure for each task with at least two settings."""
    return [_draw(front) for front in fronts(trials, factors=factors) if len(front.cells) > 1]


def undominated(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Rows that no other row beats; higher is better in each column."""
    # Row by row: all pairs at once would take gigabytes for ten thousand settings.
    return np.array(
        [not ((values >= row).all(axis=1) & (values > row).any(axis=1)).any() for row in values], dtype=bool
    )


def _cells(trials: pd.DataFrame, design: Design, quality: str, costs: Sequence[str]) -> pd.DataFrame:
    keys = list(design.cell_keys)
    numbers = cell_numbers(trials, keys)
    rows = []
    for _, part in trials.groupby(numbers, sort=False):
        interval = t_interval(part[quality].to_numpy(dtype=float))
        levels = level_texts(part.head(1), keys).iloc[0].to_dict() if keys else {}
        rows.append(
            levels
            | {name: float(part[name].mean()) for name in costs}
            | {quality: interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}
        )
    cells = pd.DataFrame(rows)
    signs = np.array([1.0 if describe(name).better == "higher" else -1.0 for name in (quality, *costs)])
    cells["undominated"] = undominated(cells[[quality, *costs]].to_numpy(dtype=float) * signs)
    best_first = describe(quality).better == "lower"
    cells = cells.sort_values([quality, costs[0]], ascending=[best_first, True], ignore_index=True)
    rank = cells["undominated"].cumsum()
    cells["number"] = rank.where(cells["undominated"] & (rank <= MAX_NUMBERED), 0)
    return cells


def _draw(front: Front) -> Plot:
    figure, all_axes = style.panels(len(front.costs), width=4.8 * len(front.costs), height=4.3)
    for axes, cost in zip(all_axes, front.costs, strict=True):
        _panel(axes, front=front, cost=cost)
        if axes is not all_axes[0]:
            axes.sharey(all_axes[0])
            axes.tick_params(labelleft=False)
            axes.set_ylabel("")
    colour = front.design.factors[0].name if front.design.factors else None
    if colour is not None:
        style.legend_below(figure, all_axes[0], title=plain(colour, limit=60))
    best = front.cells[front.cells["undominated"]]
    return Plot(
        name=f"pareto-{front.task}",
        section="pareto",
        task=front.task,
        title=f"Quality against cost ({plain(front.task, limit=40)})",
        caption=(
            f"Each point is a setting (mean over its seeds). Ringed: the {len(best)} of {len(front.cells)} "
            "settings that no other beats in quality, peak memory and throughput at once. The arrows say "
            "where better is, the numbers refer to the table of settings."
        ),
        alt=f"{front.quality} against {' and '.join(front.costs)} on the task {front.task}; "
        + "; ".join(
            f"{row['number']}: {cell_label({key: row[key] for key in front.design.cell_keys})}"
            for row in best[best["number"] > 0].to_dict("records")
        ),
        figure=figure,
    )


def _panel(axes: Axes, *, front: Front, cost: str) -> None:
    cells, quality = front.cells, describe(front.quality)
    x = in_axis_units(cells[cost].to_numpy(dtype=float), unit=describe(cost).unit)
    y = in_axis_units(cells[front.quality].to_numpy(dtype=float), unit=quality.unit)
    low = in_axis_units(cells["low"].to_numpy(dtype=float), unit=quality.unit)
    high = 2 * y - low
    if quality.unit == "fraction":
        # In per cent on this axis; no mean of accuracies lies outside.
        low, high = np.clip(low, 0, 100), np.clip(high, 0, 100)
    best = cells["undominated"].to_numpy(dtype=bool)
    several = np.isfinite(low)
    if several.any():
        axes.errorbar(
            x[several],
            y[several],
            yerr=np.stack([y - low, high - y])[:, several],
            fmt="none",
            color=style.MUTED,
            alpha=0.5,
            linewidth=1,
        )
    for mask, label, colour, marker in _groups(front):
        axes.scatter(
            x[mask & ~best], y[mask & ~best], s=26, color=colour, marker=marker, alpha=0.55, linewidths=0
        )
        axes.scatter(
            x[mask & best],
            y[mask & best],
            s=64,
            color=colour,
            marker=marker,
            edgecolors=style.INK,
            linewidths=1.4,
            zorder=3,
        )
        # An empty series of its own: the legend must not depend on which points are ringed.
        axes.scatter([], [], s=40, color=colour, marker=marker, label=label)
    axes.set_xlabel(
        f"{axis_label(describe(cost))}  {'→' if describe(cost).better == 'higher' else '←'} better"
    )
    axes.set_ylabel(f"{axis_label(quality)}  {'→' if quality.better == 'higher' else '←'} better")
    _margins(axes, x=x, y=np.concatenate([y, low[several], high[several]]))
    _number(axes, x=x, y=y, best=best, numbers=[int(number) for number in cells["number"][best]])


def _groups(front: Front) -> list[tuple[NDArray[np.bool_], str, str, str]]:
    if not front.design.factors:
        return [(np.ones(len(front.cells), dtype=bool), "", style.COLOURS[0], "o")]
    factor = front.design.factors[0]
    column = front.cells[factor.name].to_numpy()
    looks = zip(style.colours(len(factor.levels)), style.markers(len(factor.levels)), strict=True)
    return [
        (column == level, plain(level, limit=24), colour, marker)
        for level, (colour, marker) in zip(factor.levels, looks, strict=True)
    ]


def _margins(axes: Axes, *, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
    """Room around the points for their numbers."""
    for values, set_limits in ((x, axes.set_xlim), (y, axes.set_ylim)):
        span = float(np.nanmax(values) - np.nanmin(values)) or abs(float(values[0])) or 1.0
        set_limits(float(np.nanmin(values)) - 0.1 * span, float(np.nanmax(values)) + 0.14 * span)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.10g}"))


def _number(
    axes: Axes,
    *,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    best: NDArray[np.bool_],
    numbers: Sequence[int],
) -> None:
    """Write the numbers beside their points, where neither a point nor another number is."""
    # Places in points of print, on axes of about this size: the layout is not known before drawing.
    scale = np.array([_WIDTH / np.ptp(axes.get_xlim()), _HEIGHT / np.ptp(axes.get_ylim())])
    places = np.column_stack([x, y]) * scale
    corner = np.array([axes.get_xlim()[0], axes.get_ylim()[0]]) * scale
    inside = Box(corner[0], corner[1], corner[0] + _WIDTH, corner[1] + _HEIGHT)
    obstacles = [Box.around(place, width=11, height=11) for place in places[best]]
    obstacles += [Box.around(place, width=6, height=6) for place in places[~best]]
    for place, at, members in _close_together(places[best], np.column_stack([x, y])[best], numbers):
        text = ", ".join(str(number) for number in members)
        width, height = 6.5 * len(text), 9.0
        offsets = [
            (dx, dy)
            for reach in (8.0, 16.0, 26.0)
            for dx, dy in (
                (reach, 3.0),
                (-reach - width, 3.0),
                (-width / 2, reach),
                (-width / 2, -reach - height),
                (reach, -reach - 3.0),
                (-reach - width, -reach - 3.0),
            )
        ]
        boxes = [
            Box(place[0] + dx, place[1] + dy, place[0] + dx + width, place[1] + dy + height)
            for dx, dy in offsets
        ]
        crowding = [
            sum(box.meets(other) for other in obstacles) + 10 * (not box.within(inside)) for box in boxes
        ]
        chosen = crowding.index(min(crowding))
        obstacles.append(boxes[chosen])
        axes.annotate(
            text, tuple(at), xytext=offsets[chosen], textcoords="offset points", fontsize=9, fontweight="bold"
        )


@dataclass(frozen=True)
class Box:
    """A rectangle in points of print."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, place: NDArray[np.float64], *, width: float, height: float) -> Box:
        return cls(place[0] - width / 2, place[1] - height / 2, place[0] + width / 2, place[1] + height / 2)

    def within(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )

    def meets(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )


def _close_together(
    places: NDArray[np.float64], data: NDArray[np.float64], numbers: Sequence[int]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64], list[int]]]:
    """Points that lie on each other share one label."""
    groups: list[tuple[NDArray[np.float64], NDArray[np.float64], list[int]]] = []
    for place, at, number in sorted(zip(places, data, numbers, strict=True), key=lambda entry: entry[2]):
        if number == 0:
            continue
        near = next((group for group in groups if np.abs(group[0] - place).max() < _TOUCHING), None)
        if near is None:
            groups.append((place, at, [number]))
        else:
            near[2].append(number)
    return groups
