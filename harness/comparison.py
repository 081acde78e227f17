"""Implementations of one attention layer, or of a whole model, beside each other, length by length.

What is compared are trials of the workload `attention`, or of `train_step`, that are equal in everything but
the implementation and what it computes. Ratios are taken within a block (one seed, one repeat), whose trials
were measured in turns, so that a drift of the machine falls on both sides of a ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from harness.design import cell_numbers, design_of, level_texts
from harness.factors import REPLICATES
from harness.statistics import Interval, t_interval

OURS, SDPA = "ours", "SDPA"
#: What is told of a layer, each column with its interval over the blocks.
COLUMNS = (
    "forward_s",
    "step_s",
    "floor_s",
    "peak_alloc_bytes",
    "saved_bytes",
    "share_of_floor.forward",
    "share_of_floor",
    "ratio_to_best_peer.forward",
    "ratio_to_best_peer",
    "ratio_to_sdpa.forward",
    "ratio_to_sdpa",
)
#: The times that ratios and crossovers are of, and the end of the name of the ratio's column.
TIMES = {"forward_s": ".forward", "step_s": ""}
_IMPLEMENTATION, _LENGTH = "workload.implementation", "task.length"
#: Settings that tell layers apart; all others, but for how it was timed, tell comparisons apart.
_OF_A_LAYER = (
    "implementation",
    "attention",
    "model.layers",
    "model.residual",
    "model.merge",
    "model.heads_at_once",
    "model.ff_chunk_length",
    "model.loss_chunk_length",
)


@dataclass(frozen=True, kw_only=True)
class Words:
    """How a workload is told of.

    Args:
        subject: what an implementation is.
        title: what is measured of it.
        step: what `step_s` is the time of, in a sentence.
        column: that at the head of a table.
    """

    subject: str
    title: str
    step: str
    column: str


#: What is measured of an implementation.
WORKLOADS = {
    "attention": Words(
        subject="layer",
        title="One attention layer",
        step="forward and backward",
        column="forward + backward",
    ),
    "train_step": Words(subject="model", title="One training step", step="in a training step", column="step"),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer at one length.

    Args:
        backends: what computed it.
        outcome: `ok`, or how the first trial ended that has no numbers.
        values: means over the blocks by column (see `COLUMNS`), geometric ones of times and ratios; those
            that were not measured are absent.
    """

    layer: str
    length: int
    backends: tuple[str, ...]
    outcome: str
    values: Mapping[str, Interval]


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Where a layer becomes faster than SDPA, and stays so.

    Args:
        at: tokens; the shortest length where it is faster throughout, inf where it is not at the longest.
        shortest, longest: lengths at which both were measured.
    """

    layer: str
    metric: str
    at: float
    shortest: int
    longest: int

    @property
    def words(self) -> str:
        """Where it is, in a table or a sentence."""
        if math.isinf(self.at):
            return f"none in range (slower at {self.longest:,} tokens)"
        if self.at <= self.shortest:
            return f"none in range (faster from {self.shortest:,} tokens on)"
        return f"{float(f'{self.at:.3g}'):,.0f} tokens"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Layers that differ in their implementation alone.

    Args:
        words: how what was measured of each is told of.
        setting: what else was varied in the study, with its level here.
        rows: by length, ours first, then SDPA, then the peers.
    """

    words: Words
    setting: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def layers(self) -> list[str]:
        return sorted({row.layer for row in self.rows}, key=_rank)

    def curve(self, layer: str, column: str) -> dict[int, float]:
        """Means by length, where there are any."""
        return {
            row.length: row.values[column].mean
            for row in self.rows
            if row.layer == layer and column in row.values
        }

    def exponent(self, layer: str, column: str) -> float:
        """The k of a fit of length^k, by least squares on logarithms; nan for fewer than two lengths."""
        curve = {length: mean for length, mean in self.curve(layer, column).items() if mean > 0}
        if len(curve) < 2:
            return math.nan
        return float(np.polyfit(np.log(list(curve)), np.log(list(curve.values())), 1)[0])

    def crossovers(self) -> list[Crossover]:
        """One a layer and time, for those that have two lengths with SDPA in common."""
        found = []
        for layer in self.layers:
            for metric in TIMES if layer != SDPA else ():
                mine, other = self.curve(layer, metric), self.curve(SDPA, metric)
                lengths = sorted(mine.keys() & other.keys())
                if len(lengths) > 1:
                    gaps = np.log([mine[n] / other[n] for n in lengths])
                    found.append(
                        Crossover(
                            layer=layer,
                            metric=metric,
                            at=crossing(lengths, gaps),
                            shortest=lengths[0],
                            longest=lengths[-1],
                        )
                    )
        return found


def crossing(lengths: Sequence[int], gaps: NDArray[np.float64]) -> float:
    """The length after which a gap stays below 0, linear between neighbours on a logarithmic axis.

    Args:
        lengths: rising.
        gaps: log-ratios of two times at them.
    """
    slower = np.flatnonzero(gaps >= 0)
    if len(slower) == 0:
        return float(lengths[0])
    last = int(slower[-1])
    if last == len(lengths) - 1:
        return math.inf
    share = gaps[last] / (gaps[last] - gaps[last + 1])
    return float(lengths[last] * (lengths[last + 1] / lengths[last]) ** share)


def with_ratios(trials: pd.DataFrame) -> pd.DataFrame:
    """The table with columns `ratio_to_best_peer` and `ratio_to_sdpa`, of forward alone and of both passes.

    A ratio says how many times as fast a trial is as the other one of its block. The best peer at a length
    is the one with the least geometric mean over the blocks. Without such trials the table is as it was.
    """
    found: dict[str, list[pd.Series[float]]] = {}
    for workload in WORKLOADS:
        part = _layers(trials, workload=workload)
        if part.empty:
            continue
        keys = _keys(part, factors=None)
        part = part.assign(
            _place=cell_numbers(part, [*keys, _LENGTH]), _block=cell_numbers(part, _replicates(part))
        )
        peers = sorted(set(part["_layer"]) - {OURS, SDPA} - _variants(part))
        for metric, suffix in TIMES.items():
            if metric in part.columns:
                for name, against in (("ratio_to_best_peer", peers), ("ratio_to_sdpa", [SDPA])):
                    ratios = _ratios(part, metric=metric, against=against)
                    found.setdefault(f"{name}{suffix}", []).append(ratios.dropna())
    if not found:
        return trials
    columns = {name: pd.concat(parts) for name, parts in found.items() if any(map(len, parts))}
    return trials.assign(**{name: column.reindex(trials.index) for name, column in columns.items()})


def comparisons(
    trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None
) -> list[Comparison]:
    """Every group of layers that can be compared; none where there is one layer only.

    Args:
        factors: swept keys and levels as typed.
    """
    found = []
    for workload in WORKLOADS:
        part = _layers(trials, workload=workload)
        if part.empty:
            continue
        keys = _keys(part, factors=factors)
        groups = level_texts(part, keys).assign(_group=cell_numbers(part, keys))
        for _, members in groups.groupby("_group", sort=False):
            rows = _rows(part.loc[members.index])
            if len({row.layer for row in rows}) > 1:
                setting = {key: str(members[key].iloc[0]) for key in keys}
                found.append(Comparison(words=WORKLOADS[workload], setting=setting, rows=tuple(rows)))
    return found


def _layers(trials: pd.DataFrame, *, workload: str) -> pd.DataFrame:
    """The trials of single layers, or of whole models, with the name of each implementation."""
    needed = ("workload", _IMPLEMENTATION, "attention", _LENGTH)
    if not set(needed) <= set(trials.columns):
        return trials.iloc[:0]
    valid = (trials["workload"] == workload) & (trials["outcome"] != "invalid")
    # A foreign record can call its length anything.
    lengths = pd.to_numeric(trials[_LENGTH], errors="coerce")
    part = trials[valid & (lengths > 0)]
    names = [
        implementation_name(str(implementation), str(kind))
        for implementation, kind in zip(part[_IMPLEMENTATION], part["attention"], strict=True)
    ]
    return part.assign(_layer=names)


def implementation_name(implementation: str, kind: str) -> str:
    """The option of the group `implementation` that these two come to."""
    if implementation != OURS:
        return implementation
    return {"lsh": OURS, "full_standard": SDPA}.get(kind, f"{OURS}, {kind}")


def _variants(part: pd.DataFrame) -> set[str]:
    """Layers of ours that are neither LSH nor SDPA."""
    return {layer for layer in part["_layer"] if layer.startswith(f"{OURS}, ")}


def _rank(layer: str) -> tuple[int, str]:
    known = {OURS: 0, SDPA: 2}
    return known.get(layer, 1 if layer.startswith(f"{OURS}, ") else 3), layer


def _keys(part: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None) -> list[str]:
    """What else varies between these trials, apart from replicates."""
    design = design_of(part.drop(columns="_layer"), factors=factors)
    others = (name for name in design.cell_keys if not name.startswith("workload."))
    return [name for name in others if name not in (*_OF_A_LAYER, _LENGTH)]


def _replicates(part: pd.DataFrame) -> list[str]:
    return [name for name in REPLICATES if name in part.columns]


def _ratios(part: pd.DataFrame, *, metric: str, against: Sequence[str]) -> pd.Series[float]:
    """Of each trial: the time of the best of those layers in its block, over its own."""
    seconds = part[metric].where((part["outcome"] == "ok") & (part[metric] > 0)).astype(float)
    others = part.assign(_log=np.log(seconds))[part["_layer"].isin(against)].dropna(subset="_log")
    if others.empty:
        return pd.Series(np.nan, index=part.index)
    means = others.groupby(["_place", "_layer"])["_log"].mean()
    best = means.groupby("_place").idxmin().map(lambda place_and_layer: place_and_layer[1])
    chosen = others[others["_layer"] == others["_place"].map(best)]
    reference = chosen.groupby(["_place", "_block"])["_log"].mean()
    places = pd.MultiIndex.from_frame(part[["_place", "_block"]])
    theirs = np.exp(reference.reindex(places).to_numpy(dtype=float))
    return pd.Series(theirs, index=part.index) / seconds


def _mean(column: str, values: NDArray[np.float64]) -> Interval:
    """Over the blocks: the geometric mean of times and ratios, which are above 0."""
    if not column.startswith(("ratio_", *TIMES)):
        return t_interval(values)
    logs = t_interval(np.log(values))
    return Interval(mean=math.exp(logs.mean), low=math.exp(logs.low), high=math.exp(logs.high), n=logs.n)


def _rows(part: pd.DataFrame) -> list[Row]:
    columns = [name for name in COLUMNS if name in part.columns]
    rows = []
    for (layer, length), trials in part.groupby([part["_layer"], part[_LENGTH].astype(int)]):
        numbers = {name: trials[name].dropna().to_numpy(dtype=float) for name in columns}
        bad = trials["outcome"][trials["outcome"] != "ok"]
        rows.append(
            Row(
                layer=str(layer),
                length=int(str(length)),
                backends=tuple(sorted({str(word) for word in trials["backend"] if word})),
                outcome=str(bad.iloc[0]) if len(bad) else "ok",
                values={name: _mean(name, values) for name, values in numbers.items() if len(values)},
            )
        )
    return sorted(rows, key=lambda row: (row.length, _rank(row.layer)))
