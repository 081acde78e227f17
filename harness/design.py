"""The design of a study, read off its table of trials: what was swept, and what differs besides."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from harness.factors import REPLICATES, level_text, sort_levels
from harness.metrics.catalogue import KNOWN

_NOT_SETTINGS = (
    "trial_id", "study", "experiment", "outcome", "backend", "code", "cell", "started_at", "duration_s"
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Factor:
    """A swept setting and its levels; the first one is what the others are compared with."""

    name: str
    levels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What varies between the trials of a study.

    Args:
        factors: swept settings with at least two levels.
        blocks: settings that nobody swept, yet trials with the same swept levels differ in them.
        followers: settings that nobody swept and that change along with those.
    """

    factors: tuple[Factor, ...]
    blocks: tuple[str, ...]
    followers: tuple[str, ...]

    @property
    def cell_keys(self) -> tuple[str, ...]:
        """The columns that tell settings apart, replicates left out."""
        return (*(factor.name for factor in self.factors), *self.blocks)


def design_of(trials: pd.DataFrame, *, factors: Mapping[str, Sequence[str]] | None = None) -> Design:
    """The design behind a table of trials.

    Args:
        factors: swept keys and levels in the order typed; words among the levels keep that order.
    """
    typed = factors or {}
    settings = setting_columns(trials)
    # Most settings are the same in all trials: what is not text yet need not become it to see that.
    texts = level_texts(trials, [name for name in settings if trials[name].nunique(dropna=False) > 1])
    varying = [name for name in texts.columns if texts[name].nunique() > 1]
    keys = _swept(trials)
    # What an invalid trial holds was never completed by a decoder, so it says nothing on the others.
    valid = texts[trials["outcome"] != "invalid"]
    # Two workloads measure different things: trials of the two are no pair.
    swept = [name for name in varying if name in keys and name not in (*REPLICATES, "workload")]
    if "task" in swept:
        # A setting with one level a task (its length, say) is part of the task.
        settled = valid.groupby("task", sort=False)[swept].nunique().max() <= 1
        swept = [name for name in swept if name == "task" or not settled[name]]
    held = [name for name in varying if name in swept or name in REPLICATES]
    rest = [name for name in varying if name not in held and valid[name].nunique() > 1]
    blocks: list[str] = []
    for name in rest:
        known = [*held, *blocks]
        if not known or valid.groupby(known, sort=False)[name].nunique().max() > 1:
            blocks.append(name)
    return Design(
        factors=tuple(
            Factor(name=name, levels=tuple(sort_levels(texts[name], typed=typed.get(name, ()))))
            for name in swept
        ),
        blocks=tuple(blocks),
        followers=tuple(name for name in rest if name not in blocks),
    )


def by_task(trials: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The trials of each task: numbers of different tasks are never put into one."""
    if "task" not in trials.columns:
        if not trials.empty:
            yield "", trials
        return
    names = level_texts(trials, ["task"])["task"]
    tasks = names.drop_duplicates()
    for task in tasks:
        yield task, trials if len(tasks) == 1 else trials[names == task]


def setting_columns(trials: pd.DataFrame) -> list[str]:
    """The columns that are settings of a trial, swept ones first."""
    known = trials.attrs.get("settings")
    if known is not None:
        return [name for name in known if name in trials.columns]
    # A table read back from a file knows no attributes: whatever is no known metric is a setting.
    return [
        name
        for name in trials.columns
        if name not in _NOT_SETTINGS
        and "@" not in name
        and name.partition(".")[0] not in KNOWN
        and not name.startswith("tokens_per_")
    ]


def metric_columns(trials: pd.DataFrame) -> list[str]:
    """The columns that are metrics."""
    settings = set(setting_columns(trials))
    return [name for name in trials.columns if name not in settings and name not in _NOT_SETTINGS]


def level_texts(trials: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Settings as one types them: comparable whatever the type of their column."""
    columns = {}
    for name in names:
        codes, levels = pd.factorize(trials[name].astype(object))
        texts = np.array([*(level_text(level) for level in levels), level_text(None)], dtype=object)
        columns[name] = texts[codes]
    return pd.DataFrame(columns, index=trials.index, dtype="str")


def cell_numbers(trials: pd.DataFrame, names: Sequence[str]) -> pd.Series[int]:
    """A number for each distinct combination of those settings, in order of appearance."""
    if not names:
        return pd.Series(0, index=trials.index)
    return level_texts(trials, names).groupby(list(names), sort=False).ngroup()


def quality_column(trials: pd.DataFrame) -> str | None:
    """What says how good the trials of one task are: `bits_per_byte` where measured, else `accuracy`."""
    for name in ("bits_per_byte", "accuracy"):
        if name in trials.columns and trials[name].notna().any():
            return name
    return None


def _swept(trials: pd.DataFrame) -> set[str]:
    return set().union(*map(_keys, trials["cell"].drop_duplicates()))


@functools.lru_cache(maxsize=1 << 14)
def _keys(cell: object) -> frozenset[str]:
    """The keys of a cell, of which a study has one a trial, and each is asked for many times."""
    try:
        return frozenset(json.loads(str(cell)))
    except (TypeError, ValueError):
        return frozenset()
