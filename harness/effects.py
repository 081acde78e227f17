"""What each swept factor does: its main effect by matched pairs.

A pair is two trials that differ in the factor alone: every other factor, every setting that differs
besides, the seed and the repeat are equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import pandas as pd

from harness.design import Factor, by_task, design_of, level_texts, quality_column
from harness.factors import REPLICATES
from harness.metrics.catalogue import Metric, describe, effect_columns
from harness.metrics.quality import QUALITIES
from harness.statistics import CONFIDENCE, bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The mean difference that a level makes against the first level of its factor.

    Args:
        scale: `points` (hundredths), `absolute` (the metric's unit) or `log_ratio`.
        ratio: e^effect for a `log_ratio`, else nan.
        n_lost: pairs that cannot be compared, as one of the two has no such number (it failed, say).
        task: the task whose trials were paired; empty where the factor is the task itself.
    """

    factor: str
    level: str
    against: str
    metric: str
    scale: str
    effect: float
    low: float
    high: float
    ratio: float
    n_pairs: int
    n_lost: int
    task: str


#: What makes a step of one task larger than one of another.
_SIZES = ("task.length", "train.batch_size")
COLUMNS = tuple(Effect.__dataclass_fields__)


def effects(
    trials: pd.DataFrame,
    *,
    factors: Mapping[str, Sequence[str]] | None = None,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> pd.DataFrame:
    """Main effects of all swept factors, each level against the first, task by task.

    Args:
        factors: swept keys and levels as typed.
        seed: of the bootstrap; the same table gives the same intervals.
    """
    found: list[Effect] = []
    for task, part in by_task(trials):
        design = design_of(part, factors=factors)
        # Accuracy beside bits per byte would count one thing twice.
        names = [name for name in effect_columns() if name not in QUALITIES or name == quality_column(part)]
        for factor in design.factors:
            keys = match_keys(part, factor=factor, cell_keys=design.cell_keys)
            found += _factor_effects(
                part,
                factor=factor,
                keys=keys,
                task=task,
                names=names,
                confidence=confidence,
                seed=seed,
            )
    overall = design_of(trials, factors=factors)
    for factor in overall.factors:
        if factor.name == "task":
            keys = match_keys(trials, factor=factor, cell_keys=overall.cell_keys)
            # Two tasks cost alike only where they are as long.
            keys += [name for name in _SIZES if name in trials.columns and name not in keys]
            costs = [name for name in effect_columns() if describe(name).scale == "log_ratio"]
            found += _factor_effects(
                trials, factor=factor, keys=keys, task="", names=costs, confidence=confidence, seed=seed
            )
    return pd.DataFrame([asdict(effect) for effect in found], columns=list(COLUMNS))


def matched(trials: pd.DataFrame, *, factor: Factor, keys: Sequence[str], metric: str) -> pd.DataFrame:
    """A metric with one row a matched cell and one column a level; nan where there is no such number."""
    return _by_level(trials, places=_places(trials, factor=factor, keys=keys), factor=factor, metric=metric)


def _places(trials: pd.DataFrame, *, factor: Factor, keys: Sequence[str]) -> pd.DataFrame:
    """Of each trial the matched cell and the level, whatever the metric."""
    texts = level_texts(trials, [*keys, factor.name])
    # In the order in which levels appear, key by key, so that the same table gives the same intervals.
    codes = pd.DataFrame({key: pd.factorize(texts[key])[0] for key in keys}, index=texts.index)
    cells = codes.groupby(list(keys)).ngroup() if keys else 0
    return texts[[factor.name]].assign(_cell=cells)


def _by_level(trials: pd.DataFrame, *, places: pd.DataFrame, factor: Factor, metric: str) -> pd.DataFrame:
    values = trials[metric].where(trials["outcome"] == "ok").astype(float)
    # Cells without any number stay as rows: they are pairs that were lost.
    means = values.groupby([places["_cell"], places[factor.name]]).mean()
    return means.unstack(factor.name).reindex(columns=list(factor.levels))


def match_keys(trials: pd.DataFrame, *, factor: Factor, cell_keys: Sequence[str]) -> list[str]:
    """The columns that two trials of a pair agree in."""
    others = [name for name in cell_keys if name != factor.name]
    return [*others, *(name for name in REPLICATES if name in trials.columns)]


def _factor_effects(
    trials: pd.DataFrame,
    *,
    factor: Factor,
    keys: Sequence[str],
    task: str,
    names: Sequence[str],
    confidence: float,
    seed: int,
) -> list[Effect]:
    found = []
    places = _places(trials, factor=factor, keys=keys)
    planned = _planned(trials, places=places, factor=factor)
    if not any(planned[level] for level in factor.levels[1:]):
        return []
    for name in names:
        if name not in trials.columns or trials[name].isna().all():
            continue
        metric = describe(name)
        cells = _scaled(_by_level(trials, places=places, factor=factor, metric=name), metric=metric)
        first = factor.levels[0]
        for level in factor.levels[1:]:
            differences = (cells[level] - cells[first]).dropna().to_numpy()
            interval = bootstrap_interval(differences, confidence=confidence, seed=seed)
            found.append(
                Effect(
                    factor=factor.name,
                    level=level,
                    against=first,
                    metric=name,
                    scale=metric.scale,
                    effect=interval.mean,
                    low=interval.low,
                    high=interval.high,
                    ratio=math.exp(interval.mean) if metric.scale == "log_ratio" else math.nan,
                    n_pairs=interval.n,
                    n_lost=planned[level] - interval.n,
                    task=task,
                )
            )
    return found


def _planned(trials: pd.DataFrame, *, places: pd.DataFrame, factor: Factor) -> dict[str, int]:
    """For each level, in how many cells both it and the first level have a record, whatever its outcome."""
    recorded = trials[["outcome"]].assign(outcome="ok", _there=1.0)
    there = _by_level(recorded, places=places, factor=factor, metric="_there").notna()
    return {level: int((there[level] & there[factor.levels[0]]).sum()) for level in factor.levels}


def _scaled(cells: pd.DataFrame, *, metric: Metric) -> pd.DataFrame:
    if metric.scale == "points":
        return cells * 100
    if metric.scale == "log_ratio":
        return cells.where(cells > 0).map(math.log, na_action="ignore")
    return cells
