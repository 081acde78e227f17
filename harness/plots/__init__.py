"""Figures from the table of trials, one kind a file: `draw` gives what there is to show, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd

from harness.plots import (
    collisions,
    factor_curves,
    outcomes,
    pareto,
    scaling,
    style,
    time_shares,
    train_eval,
    training_curves,
)
from harness.plots.plot import Plot
from harness.record import TrialRecord

__all__ = ["Plot", "draw_all", "thinned"]


def draw_all(
    trials: pd.DataFrame,
    *,
    records: Sequence[TrialRecord],
    factors: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Plot]:
    """Every figure that these trials have something to show on, in the order of the report."""
    if trials.empty:
        return
    kinds: tuple[Callable[[], list[Plot]], ...] = (
        lambda: pareto.draw(trials, factors=factors),
        lambda: factor_curves.draw(trials, factors=factors),
        lambda: scaling.draw(trials, factors=factors),
        lambda: train_eval.draw(trials, factors=factors),
        lambda: collisions.draw(trials, records=records, factors=factors),
        lambda: training_curves.draw(trials, records=records, factors=factors),
        lambda: time_shares.draw(trials, factors=factors),
        lambda: outcomes.draw(trials, factors=factors),
    )
    for draw in kinds:
        with style.theme():
            plots = draw()
        yield from plots


def thinned(series: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Mapping[str, list[float]]]:
    """The curves of a record as far as figures show them."""
    shown = {name: columns for name, columns in series.items() if name == "collision"}
    return {**shown, "train": training_curves.thinned(series["train"])} if "train" in series else shown
