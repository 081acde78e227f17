"""What a report shows, in its order, as blocks of tables, text and pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pandas as pd

from harness.aggregate import Digest
from harness.comparison import TIMES, Comparison, Crossover, Row, comparisons
from harness.design import by_task, design_of, level_texts
from harness.factors import REPLICATES, level_text, sort_levels
from harness.formatting import (
    NOTHING,
    cell_label,
    duration,
    effect,
    interval,
    plain,
    seconds,
    short_name,
    value,
)
from harness.metrics.catalogue import Metric, describe
from harness.plots.collisions import Families, families
from harness.plots.pareto import Front, fronts
from harness.plots.train_eval import Grid, grids
from harness.record import TrialRecord
from harness.report.document import Block, Cell, Details, Document, Picture, Section, Table, Text, cell
from harness.report.narrative import cautions, verdict
from harness.store import Unreadable

_EFFECT_METRICS = ("accuracy", "bits_per_byte", "step_s", "peak_alloc_bytes", "saved_bytes", "flops")
_TRIAL_METRICS = (
    "accuracy", "bits_per_byte", "peak_alloc_bytes", "saved_bytes", "tokens_per_s", "step_s", "flops"
)  # fmt: skip
#: What the comparison of implementations shows, and how it calls it; empty: as the workload is told of.
_LAYER_COLUMNS = {
    "forward_s": "forward",
    "ratio_to_best_peer.forward": "× best peer",
    "step_s": "",
    "ratio_to_best_peer": "× best peer",
    "share_of_floor": "share of the floor",
    "peak_alloc_bytes": "peak memory",
}
#: Rows that a browser still shows and sorts at once.
_MAX_TRIALS = 2000
#: Failures that are told one by one.
_MAX_FAILURES = 200
#: Lines of a traceback or log that are shown with a failure: the end tells the cause.
_TAIL = 20


@dataclass(frozen=True, kw_only=True)
class Study:
    """All that a report is made of.

    Args:
        records: oldest first, without samples, and of curves what figures show.
        digests: what tables show of each record.
        factors: swept keys and levels as typed.
    """

    name: str
    info: Mapping[str, Any]
    records: Sequence[TrialRecord]
    digests: Sequence[Digest]
    unreadable: Sequence[Unreadable]
    trials: pd.DataFrame
    effects: pd.DataFrame
    factors: Mapping[str, Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A picture, the section it belongs to, and the task that it shows (empty: all)."""

    section: str
    task: str
    picture: Picture


def document(study: Study, *, pictures: Sequence[Placed]) -> Document:
    """The report of a study, with a picture before the table of the same section and task."""
    found = fronts(study.trials, factors=study.factors)

    def section(
        key: str,
        title: str,
        blocks: Sequence[Block],
        *,
        tables: Mapping[str, Table] | None = None,
        otherwise: str = "",
    ) -> Section | None:
        shown: list[Block] = []
        rest = dict(tables or {})
        for placed in pictures:
            if placed.section == key:
                shown.append(placed.picture)
                if placed.task in rest:
                    shown.append(rest.pop(placed.task))
        shown += [*rest.values(), *blocks]
        if not shown and otherwise:
            shown = [Text(lines=(otherwise,))]
        return Section(key=key, title=title, blocks=tuple(shown)) if shown else None

    parts = (
        section("run", "What was run", _what_was_run(study)),
        section("verdict", "Verdict", _verdict(study, found=found)),
        section(
            "pareto",
            "Quality against cost",
            [],
            tables={front.task: _front_table(front) for front in found if len(front.cells) > 1},
            otherwise="There are no two settings with quality and cost to weigh against each other.",
        ),
        section(
            "effects",
            "What each factor does",
            _effect_tables(study),
            otherwise="No factor was measured at two levels with all others equal, so no effect can be told.",
        ),
        section("peers", "Beside the peers", _peer_tables(study)),
        section("factors", "Factor by factor", []),
        section(
            "train_eval",
            "Train × eval",
            [],
            tables={grid.task: _grid_table(grid) for grid in grids(study.trials, factors=study.factors)},
        ),
        section(
            "hash_families",
            "Hash families",
            [],
            tables={
                found.task: _family_table(found) for found in families(study.trials, factors=study.factors)
            },
        ),
        section("training", "Training curves", []),
        section("time", "Where the time goes", []),
        section("trials", "All trials", _trial_tables(study), otherwise="No trial has a record yet."),
        section("failures", "Failures", _failures(study)),
        section("environment", "Environment", _environment(study)),
    )
    return Document(
        title=plain(study.name, limit=100),
        subtitle=_subtitle(study),
        sections=tuple(part for part in parts if part is not None),
    )


def _subtitle(study: Study) -> str:
    trials = study.trials
    done = int((trials["outcome"] == "ok").sum())
    tasks = ", ".join(plain(task, limit=40) for task, _ in by_task(trials)) or "no task"
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'}, {done} finished · {tasks}"


def _what_was_run(study: Study) -> list[Block]:
    facts: list[tuple[str, str]] = []

    def fact(name: str, text: str) -> None:
        if text:
            facts.append((name, text))

    fact("Experiment", ", ".join(sorted(set(study.trials["experiment"]))))
    fact("Command", str(study.info.get("command", "")))
    for task, part in by_task(study.trials):
        fact(f"Task {plain(task, limit=40)}", _task_fields(part))
    for factor in design_of(study.trials, factors=study.factors).factors:
        fact(f"Swept: {factor.name}", ", ".join(factor.levels))
    if "seed" in study.trials.columns:
        fact("Seeds", ", ".join(sort_levels(level_texts(study.trials, ["seed"])["seed"])))
    for label, name in (("Processor", "cpu_model"), ("Device", "device_name"), ("PyTorch", "torch")):
        fact(label, _values(study.records, name))
    fact("Attention computed by", _values(study.records, "backend"))
    for label, name in (("Threads", "threads"), ("Precision", "dtype")):
        if name in study.trials.columns:
            fact(label, ", ".join(sort_levels(level_texts(study.trials, [name])[name])))
    fact("Code", ", ".join(sorted(code for code in set(study.trials["code"]) if code)))
    started = [text for text in study.trials["started_at"] if text]
    if started:
        total = float(study.trials["duration_s"].sum())
        fact(
            "Measured",
            f"from {_moment(min(started))} to {_moment(max(started))}, {duration(total)} in trials",
        )
    rows = tuple((cell(name), cell(text)) for name, text in facts)
    if not rows:
        return [Text(lines=("Nothing yet: the study holds no record.",))]
    return [Table(caption="The study", headers=("", "value"), rows=rows, n_labels=2)]


def _moment(started_at: str) -> str:
    """An ISO time to the minute; as it is, should it be none."""
    try:
        return f"{datetime.fromisoformat(started_at).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except ValueError:
        return started_at


def _task_fields(trials: pd.DataFrame) -> str:
    names = [name for name in trials.columns if name.startswith("task.")]
    texts = level_texts(trials, names)
    return ", ".join(
        f"{short_name(name)} {' or '.join(plain(level, limit=60) for level in sort_levels(texts[name])[:8])}"
        for name in names
        if (texts[name] != "null").any()
    )


def _values(records: Sequence[TrialRecord], name: str) -> str:
    found = Counter(str(record.environment[name]) for record in records if record.environment.get(name))
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text} ({count} trials)" for text, count in found.most_common(6))


def _verdict(study: Study, *, found: Sequence[Front]) -> list[Block]:
    told = verdict(study.trials, effects=study.effects, fronts=found, factors=study.factors)
    blocks: list[Block] = [
        Text(title=plain(task, limit=40) if len(told) > 1 else "", lines=tuple(lines), bullets=True)
        for task, lines in told.items()
    ] or [Text(lines=("No finished trial to judge by.",))]
    careful = cautions(
        study.trials,
        records=study.records,
        unreadable=study.unreadable,
        info=study.info,
        effects=study.effects,
        factors=study.factors,
    )
    if careful:
        blocks.append(Text(title="To be read with care", lines=tuple(careful), bullets=True))
    return blocks


def _front_table(front: Front) -> Table:
    quality = describe(front.quality)
    rows = []
    for row in front.cells[front.cells["undominated"]].to_dict("records"):
        bounds = ""
        if math.isfinite(row["low"]):
            bounds = f"[{value(row['low'], metric=quality)}, {value(row['high'], metric=quality)}]"
        number = int(row["number"])
        rows.append(
            (
                cell(number or "", value=float(number) if number else None),
                cell(cell_label({name: row[name] for name in front.design.cell_keys}) or "the only setting"),
                cell(value(row[front.quality], metric=quality), value=row[front.quality], detail=bounds),
                *(cell(value(row[name], metric=describe(name)), value=row[name]) for name in front.costs),
                cell(row["n"], value=float(row["n"])),
            )
        )
    headers = ("no.", "setting", quality.label, *(describe(name).label for name in front.costs), "seeds")
    return Table(
        caption=f"Undominated settings on {plain(front.task, limit=40)}, best {quality.label} first",
        headers=headers,
        rows=tuple(rows),
        n_labels=2,
        sortable=True,
    )


def _effect_tables(study: Study) -> list[Block]:
    tables: list[Block] = []
    for task in study.effects["task"].drop_duplicates():
        effects = study.effects[study.effects["task"] == task]
        names = [name for name in _EFFECT_METRICS if (effects["metric"] == name).any()]
        rows = []
        for (factor, level, against), part in effects.groupby(["factor", "level", "against"], sort=False):
            found = {str(row["metric"]): row for row in part.to_dict("records")}
            pairs = max(int(row["n_pairs"]) for row in found.values())
            lost = max(int(row["n_lost"]) for row in found.values())
            rows.append(
                (
                    cell(factor),
                    cell(f"{plain(against, limit=40)} → {plain(level, limit=40)}"),
                    *(_effect_cell(found.get(name)) for name in names),
                    cell(pairs, value=float(pairs), detail=f"{lost} lost" if lost else ""),
                )
            )
        place = f"on {plain(task, limit=40)}" if task else "of the task itself"
        tables.append(
            Table(
                caption=f"Main effects {place} by matched pairs, with 95 % intervals; × means times as much",
                headers=("factor", "change", *(describe(name).label for name in names), "pairs"),
                rows=tuple(rows),
                n_labels=2,
            )
        )
    return tables


def _effect_cell(row: Mapping[str, Any] | None) -> Cell:
    if row is None or not math.isfinite(row["effect"]):
        return cell(NOTHING)
    bounds = interval(row["low"], row["high"], scale=row["scale"])
    return cell(effect(row["effect"], scale=row["scale"]), value=row["effect"], detail=bounds)


def _peer_tables(study: Study) -> list[Block]:
    found = comparisons(study.trials, factors=study.factors)
    return [table for one in found for table in (_layer_table(one), _crossover_table(one)) if table.rows]


def _layer_table(comparison: Comparison) -> Table:
    setting = f" ({cell_label(comparison.setting)})" if comparison.setting else ""
    return Table(
        caption=(
            f"{comparison.words.title}{setting}: means over the repeats, with 95 % intervals. × best peer: "
            "how many times as fast, within a repeat; a share of the floor is the part of the time that the "
            "matrix products alone would take"
        ),
        headers=(
            comparison.words.subject,
            "computed by",
            "tokens",
            *(name or comparison.words.column for name in _LAYER_COLUMNS.values()),
        ),
        rows=tuple(
            (
                cell(row.layer),
                cell(", ".join(row.backends) or NOTHING),
                cell(f"{row.length:,}", value=float(row.length)),
                *(_layer_cell(row, name) for name in _LAYER_COLUMNS),
            )
            for row in comparison.rows
        ),
        n_labels=2,
        sortable=True,
    )


def _layer_cell(row: Row, name: str) -> Cell:
    found, metric = row.values.get(name), describe(name)
    if found is None:
        failed = row.outcome != "ok" and name in TIMES
        return cell(row.outcome.replace("_", " ") if failed else NOTHING)
    bounds = ""
    # The best peer beside itself has no interval to speak of.
    if metric.unit == "ratio" and math.isfinite(found.low) and found.high > found.low * (1 + 1e-9):
        bounds = interval(math.log(found.low), math.log(found.high), scale="log_ratio")
    return cell(value(found.mean, metric=metric), value=found.mean, detail=bounds)


def _crossover_table(comparison: Comparison) -> Table:
    by_layer: dict[str, dict[str, Crossover]] = {}
    for found in comparison.crossovers():
        by_layer.setdefault(found.layer, {})[found.metric] = found
    return Table(
        caption=(
            f"From which length on a {comparison.words.subject} is faster than full attention (SDPA), "
            "between measured lengths by a straight line on logarithmic axes"
        ),
        headers=(comparison.words.subject, "forward", comparison.words.column),
        rows=tuple(
            (
                cell(layer),
                *(
                    cell(where[name].words, value=where[name].at) if name in where else cell(NOTHING)
                    for name in TIMES
                ),
            )
            for layer, where in by_layer.items()
        ),
        n_labels=1,
    )


def _grid_table(grid: Grid) -> Table:
    metric = describe(grid.quality)
    rows = tuple(
        (
            cell(label),
            cell(count, value=float(count)),
            *(cell(value(number, metric=metric), value=number) for number in numbers),
        )
        for label, count, numbers in zip(
            grid.means.index, grid.n_trials, grid.means.itertuples(index=False), strict=True
        )
    )
    headings = [
        name if index >= len(grid.means.columns) - grid.n_controls else f"{name} at eval"
        for index, name in enumerate(grid.means.columns)
    ]
    return Table(
        caption=f"Mean {metric.label} on {plain(grid.task, limit=40)} by training and evaluation",
        headers=("trained with", "trials", *(plain(heading, limit=40) for heading in headings)),
        rows=rows,
    )


def _family_table(found: Families) -> Table:
    metrics = [describe(name) for name in found.metrics]
    return Table(
        caption=(
            f"Hash families on {plain(found.task, limit=40)}; recall is the share of full attention's "
            "weights that LSH attention reaches, on the queries of a fresh model"
        ),
        headers=("family", *map(short_name, found.keys), *(metric.label for metric in metrics)),
        rows=tuple(
            (
                *(cell(row[name]) for name in ("family", *found.keys)),
                *(_number_cell(float(row[metric.name]), metric=metric) for metric in metrics),
            )
            for row in found.means.to_dict("records")
        ),
        n_labels=1 + len(found.keys),
        sortable=True,
    )


def _number_cell(number: float, *, metric: Metric) -> Cell:
    return cell(value(number, metric=metric), value=number if math.isfinite(number) else None)


def _trial_tables(study: Study) -> list[Block]:
    trials = study.trials
    if trials.empty:
        return []
    design = design_of(trials, factors=study.factors)
    keys = [name for name in ("task",) if name in design.cell_keys]
    keys += [name for name in design.cell_keys if name not in keys]
    keys += [name for name in REPLICATES if name in trials.columns and trials[name].nunique() > 1]
    names = [name for name in _TRIAL_METRICS if name in trials.columns and trials[name].notna().any()]
    texts = level_texts(trials, keys)
    ranks = pd.DataFrame(
        {
            key: texts[key].map(
                {
                    level: rank
                    for rank, level in enumerate(sort_levels(texts[key], typed=study.factors.get(key, ())))
                }
            )
            for key in keys
        },
        index=trials.index,
    )
    order = (ranks.sort_values(keys, kind="stable").index if keys else trials.index)[:_MAX_TRIALS]
    shown = trials.loc[order]
    numbers = shown[names].to_dict("index")
    levels = texts.loc[order].to_dict("index")
    identity = shown[["trial_id", "outcome", "backend", "duration_s"]].to_dict("index")
    backends = ("backend",) if (trials["backend"] != "").any() else ()
    rows = tuple(
        (
            cell(identity[at]["trial_id"], href=f"../trials/{identity[at]['trial_id']}.json"),
            *(cell(levels[at][key]) for key in keys),
            cell(str(identity[at]["outcome"]).replace("_", " ")),
            *(cell(str(identity[at][name]) or NOTHING) for name in backends),
            *(
                cell(
                    value(float(numbers[at][name]), metric=describe(name)),
                    value=float(numbers[at][name]) if math.isfinite(numbers[at][name]) else None,
                )
                for name in names
            ),
            cell(seconds(float(identity[at]["duration_s"])), value=float(identity[at]["duration_s"])),
        )
        for at in order
    )
    headers = (
        "trial",
        *(short_name(key) for key in keys),
        "outcome",
        *backends,
        *(describe(name).label for name in names),
        "took",
    )
    told = f"All {len(trials)} trials; trials.csv has every column"
    if len(order) < len(trials):
        told = (
            f"The first {len(order):,} of {len(trials):,} trials; trials.csv has them all, with every column"
        )
    return [
        Table(
            caption=told,
            headers=headers,
            rows=rows,
            n_labels=2 + len(keys) + len(backends),
            sortable=True,
        )
    ]


def _failures(study: Study) -> list[Block]:
    blocks: list[Block] = []
    failed = [record for record in study.records if record.outcome.status != "ok"]
    for record in failed[:_MAX_FAILURES]:
        outcome = record.outcome
        facts = [outcome.message or "no message"]
        if outcome.signal is not None:
            facts.append(f"signal {outcome.signal}")
        if outcome.rss_bytes_at_death is not None:
            facts.append(f"{outcome.rss_bytes_at_death / 2**20:,.0f} MiB resident at its end")
        levels = {str(key): level_text(level) for key, level in record.cell.items()}
        tail = [*outcome.traceback.splitlines()[-_TAIL:], *outcome.stderr[-_TAIL:]]
        blocks.append(
            Details(
                summary=plain(
                    f"{outcome.status.replace('_', ' ')}: {cell_label(levels)} (trial {record.trial_id}): "
                    f"{', '.join(facts)}",
                    limit=500,
                ),
                text="\n".join(plain(line, limit=500) for line in tail),
            )
        )
    blocks += [
        Details(summary=plain(f"not a record: {entry.path.name}: {entry.reason}", limit=500), text="")
        for entry in study.unreadable[:_MAX_FAILURES]
    ]
    left = max(0, len(failed) - _MAX_FAILURES) + max(0, len(study.unreadable) - _MAX_FAILURES)
    if left:
        blocks.append(
            Text(lines=(f"And {left:,} more: trials.csv has every outcome, trials/ every record.",))
        )
    return blocks


def _environment(study: Study) -> list[Block]:
    names = dict.fromkeys(str(name) for record in study.records for name in record.environment)
    rows = []
    for name in names:
        found = Counter(
            _json(record.environment[name]) for record in study.records if name in record.environment
        )
        if len(found) > 6:
            text = f"{len(found)} different values"
        elif len(found) == 1:
            text = next(iter(found))
        else:
            text = "; ".join(f"{value} ({count} trials)" for value, count in found.most_common())
        rows.append((cell(name), cell(text)))
    if not rows:
        return []
    return [Table(caption="Where it was measured", headers=("", "value"), rows=tuple(rows), n_labels=2)]


def _json(entry: object) -> str:
    if type(entry) is int:
        return str(entry)
    return entry if isinstance(entry, str) else json.dumps(entry, sort_keys=True, default=str)
