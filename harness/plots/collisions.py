"""How often two vectors share a bucket, by their distance: each hash family, measured and as predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from harness.design import by_task, design_of, level_texts, setting_columns
from harness.factors import flatten, level_text, sort_levels
from harness.formatting import plain, short_name
from harness.plots import style
from harness.plots.plot import Plot
from harness.record import TrialRecord

_COLUMNS = ("family", "distance", "n_buckets", "d_head", "x", "rate", "variance", "theory")
#: For each measure of distance: the axis, what turns a value into its unit, and its ticks.
_AXES = {
    "angle": ("angle (degrees)", 180 / np.pi, np.arange(0, 181, 30)),
    "flip_rate": ("share of flipped signs (%)", 100.0, np.arange(0, 101, 20)),
}
#: More families than this in one panel cannot be told apart.
_MAX_LINES = 10
#: What is told of a family: measured of it alone, then of the trials that were trained with it.
_METRICS = (
    "recall", "bucket_max_over_mean", "bucket_entropy_bits", "accuracy", "bits_per_byte", "tokens_per_s"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Families:
    """Means by hash family on one task.

    Args:
        keys: what else was varied: one row a family and combination of these.
        metrics: what was measured.
        means: columns `family`, keys and metrics.
    """

    task: str
    keys: tuple[str, ...]
    metrics: tuple[str, ...]
    means: pd.DataFrame


def families(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> list[Families]:
    """What is known of the hash families on each task where their recall was measured."""
    found = []
    for task, part in by_task(trials):
        metrics = [name for name in _METRICS if name in part.columns and part[name].notna().any()]
        if "recall" not in metrics:
            continue
        design = design_of(part, factors=factors)
        keys = [name for name in design.cell_keys if name != "workload" and not name.startswith("hashing")]
        labels = _labels(part)
        groups = level_texts(part, keys).assign(family=labels)
        means = part[metrics].groupby([groups[name] for name in ("family", *keys)], sort=False).mean()
        order = sort_levels(labels, typed=(factors or {}).get("hashing", ()))
        means = means.reset_index().sort_values(
            "family", key=lambda column: column.map(order.index), kind="stable"
        )
        found.append(Families(task=task, keys=tuple(keys), metrics=tuple(metrics), means=means))
    return found


def draw(
    trials: pd.DataFrame,
    *,
    records: Iterable[TrialRecord],
    factors: Mapping[str, Sequence[str]] | None = None,
) -> list[Plot]:
    """One figure for each bucket count and head size: a panel for each measure of distance."""
    curves = pd.DataFrame([row for record in records for row in _curve(record)], columns=list(_COLUMNS))
    typed = (factors or {}).get("hashing", ())
    return [
        _draw(part, n_buckets=str(n_buckets), d_head=str(d_head), typed=typed)
        for (n_buckets, d_head), part in curves.groupby(["n_buckets", "d_head"], sort=False)
    ]


def family_label(settings: Mapping[str, Any]) -> str:
    """The hash family of a trial, with those of its fields that are set; from its settings by dotted keys."""
    fields = {
        short_name(key): level_text(level) for key, level in settings.items() if key.startswith("hashing.")
    }
    told = [f"{name} {text}" for name, text in fields.items() if text not in ("null", "false")]
    return ", ".join([level_text(settings.get("hashing")), *told])


def _labels(trials: pd.DataFrame) -> list[str]:
    fields = [name for name in setting_columns(trials) if name == "hashing" or name.startswith("hashing.")]
    rows = level_texts(trials, fields).to_dict("records")
    return [family_label({str(name): level for name, level in row.items()}) for row in rows]


def _curve(record: TrialRecord) -> Iterator[tuple[str | float, ...]]:
    series, theory = record.series.get("collision", {}), record.theory
    measured = [series.get(name, []) for name in ("distance", "rate", "standard_error")]
    distance = theory.get("distance")
    if distance not in _AXES or len({len(column) for column in measured}) != 1:
        return
    predicted = series.get("theory") or [np.nan] * len(measured[0])
    setting = (
        family_label(flatten(record.spec)),
        str(distance),
        level_text(theory.get("n_buckets")),
        level_text(theory.get("d_head")),
    )
    for x, rate, error, expected in zip(*measured, predicted, strict=False):
        yield (*setting, x, rate, error**2, expected)


def _draw(curves: pd.DataFrame, *, n_buckets: str, d_head: str, typed: Sequence[str]) -> Plot:
    measures = [name for name in _AXES if (curves["distance"] == name).any()]
    figure, all_axes = style.panels(len(measures), width=4.9 * len(measures), height=3.9)
    for axes, measure in zip(all_axes, measures, strict=True):
        _panel(axes, curves=curves[curves["distance"] == measure], measure=measure, typed=typed)
        axes.set_ylabel("pairs in one bucket (%)" if axes is all_axes[0] else "")
    names = sort_levels(curves["family"].unique(), typed=typed)
    where = f"{plain(n_buckets, limit=16)} buckets, heads of {plain(d_head, limit=16)}"
    return Plot(
        name=f"collisions-{n_buckets}-{d_head}",
        section="hash_families",
        title=f"Collision curves ({where})",
        caption=(
            "Marks: how often two vectors share a bucket in one round, each pair and each draw of the family "
            "fresh, ± one standard error. Solid lines: the closed form. Dotted ones join marks where none is "
            "known."
        ),
        alt=f"Share of pairs in one bucket against their distance, {where}: {', '.join(names)}",
        figure=figure,
    )


def _panel(axes: Axes, *, curves: pd.DataFrame, measure: str, typed: Sequence[str]) -> None:
    label, scale, ticks = _AXES[measure]
    names = sort_levels(curves["family"].unique(), typed=typed)[:_MAX_LINES]
    looks = zip(style.colours(len(names)), style.markers(len(names)), strict=True)
    for family, (colour, marker) in zip(names, looks, strict=True):
        curve = _pooled(curves[curves["family"] == family])
        x, rate = scale * curve.index.to_numpy(), 100 * curve["rate"]
        predicted = curve["theory"].notna().all()
        axes.plot(
            x,
            100 * curve["theory"] if predicted else rate,
            color=colour,
            linestyle="-" if predicted else ":",
            linewidth=0.9,
        )
        axes.errorbar(
            x,
            rate,
            yerr=100 * curve["error"],
            color=colour,
            marker=marker,
            markersize=4.5,
            markeredgecolor=style.PAPER,
            markeredgewidth=0.5,
            linestyle="none",
            elinewidth=1,
            label=plain(family, limit=40),
        )
    axes.set_xlabel(label)
    axes.set_xticks(ticks)
    axes.set_ylim(-2, 102)
    axes.set_title(f"By {label.partition(' (')[0]}")
    # Curves are high at either end, if at all.
    axes.legend(loc="upper center", handletextpad=0.3)


def _pooled(curve: pd.DataFrame) -> pd.DataFrame:
    """Mean over the trials of a family (its seeds) at each distance, with its standard error."""
    by_distance = curve.groupby("x")
    pooled = by_distance[["rate", "theory"]].mean()
    return pooled.assign(error=np.sqrt(by_distance["variance"].sum()) / by_distance.size())
