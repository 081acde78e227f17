"""The verdict in sentences, made from the numbers, and what a reader should be careful with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from harness.comparison import OURS, SDPA, Comparison, comparisons
from harness.design import Design, by_task, design_of, level_texts, quality_column
from harness.formatting import MINUS, cell_label, effect, interval, plain, ratio, short_name, signed, value
from harness.metrics.catalogue import Metric, describe
from harness.metrics.quality import FLOORS, LEARNED
from harness.metrics.time import DISTURBED
from harness.plots.pareto import Front
from harness.record import STATUSES, TrialRecord
from harness.store import Unreadable

#: How a level is told in a sentence; other factors are told by their key.
_PHRASES = {
    "attention.n_hashes": "{level} hash rounds instead of {against}",
    "attention.n_buckets": "{level} buckets instead of {against}",
    "attention.chunk_length": "chunks of {level} instead of {against}",
    "task.length": "sequences of {level} instead of {against} tokens",
    "model.residual": "{level} residuals instead of {against}",
    "model.n_layers": "{level} layers instead of {against}",
    "attention": "{level} attention instead of {against}",
    "hashing": "{level} hashing instead of {against}",
}
#: Ratios nearer to 1 than this are told as no difference: a tenth of a per cent is nobody's finding.
_SAME = 0.001
#: What a machine is, as far as numbers depend on it.
MACHINE = ("torch", "cpu_model", "cpu_capability", "device_name", "threads", "allocator", "mem_method")


def verdict(
    trials: pd.DataFrame,
    *,
    effects: pd.DataFrame,
    fronts: Sequence[Front],
    factors: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, list[str]]:
    """The findings of each task: best setting, our layer beside others, what each factor and control does."""
    found = {}
    for task, part in by_task(trials):
        mine = [
            *(_best(front) for front in fronts if front.task == task),
            *(line for one in comparisons(part, factors=factors) for line in _peer_lines(one)),
            *_factor_lines(effects[effects["task"] == task], quality=quality_column(part)),
            *_control_lines(part),
        ]
        if mine:
            found[task] = [line[:1].upper() + line[1:] for line in mine]
    return found


def cautions(
    trials: pd.DataFrame,
    *,
    records: Sequence[TrialRecord],
    unreadable: Sequence[Unreadable],
    info: Mapping[str, Any],
    effects: pd.DataFrame,
    factors: Mapping[str, Sequence[str]],
) -> list[str]:
    """What is missing, mixed or weak in this study."""
    return [
        *_incomplete(trials, unreadable=unreadable, info=info),
        *_mixed(records),
        *_disturbed(trials, records=records),
        *_eval_sets(trials, records=records),
        *(line for task, part in by_task(trials) for line in _near_floor(part, task=task)),
        *(line for task, part in by_task(trials) for line in _design_lines(part, task=task, factors=factors)),
        *_lost_pairs(effects),
        *_one_seed(trials),
    ]


def change(row: Mapping[str, Any], *, metric: Metric) -> str:
    """One effect as a phrase: `+8.3 points [7.1, 9.4]`, `2.6× slower [2.5, 2.7]`."""
    at, low, high = float(row["effect"]), float(row["low"]), float(row["high"])
    bounds = interval(low, high, scale=str(row["scale"]))
    unclear = math.isfinite(low) and low <= 0 <= high
    if metric.scale != "log_ratio":
        unit = "" if metric.scale == "points" else f" {metric.label}"
        told = f"{effect(at, scale=metric.scale)}{unit} {bounds}".strip()
        return f"no clear change in {metric.label} ({told})" if unclear and at != 0 else told
    noun = {"step_s": "speed", "peak_alloc_bytes": "peak memory"}.get(metric.name, metric.label)
    if abs(at) < _SAME and not (math.isfinite(low) and max(abs(low), abs(high)) >= _SAME):
        return f"the same {noun}"
    if unclear:
        what = "the time per step" if noun == "speed" else f"the {noun}"
        return f"no clear change in {noun} ({ratio(math.exp(at))} {what} {bounds})"
    return _ratio_words(at, low, high, noun=noun)


def _ratio_words(at: float, low: float, high: float, *, noun: str) -> str:
    """A clear ratio: in per cent where it is small, as a multiple where it is large."""
    grows = at > 0
    if noun == "speed":
        words = "slower" if grows else "faster"
        if not grows:
            at, low, high = -at, -high, -low
        if at >= math.log(1.2):
            return f"{ratio(math.exp(at))} {words} {interval(low, high, scale='log_ratio')}".strip()
        return f"{_per_cent(at)} % {words} {_per_cent_interval(low, high)}".strip()
    if at >= math.log(1.5):
        return f"{ratio(math.exp(at))} the {noun} {interval(low, high, scale='log_ratio')}".strip()
    if grows:
        return f"{_per_cent(at)} % more {noun} {_per_cent_interval(low, high)}".strip()
    less = f"[{_per_cent(high)}, {_per_cent(low)}]".replace(MINUS, "") if math.isfinite(low) else ""
    return f"{_per_cent(at).replace(MINUS, '')} % less {noun} {less}".strip()


def _per_cent(log_ratio: float) -> str:
    percent = 100 * math.expm1(log_ratio)
    return signed(percent, decimals=1 if abs(percent) < 10 else 0).removeprefix("+")


def _per_cent_interval(low: float, high: float) -> str:
    return f"[{_per_cent(low)}, {_per_cent(high)}]" if math.isfinite(low) else ""


def _best(front: Front) -> str:
    best = front.cells.iloc[0].to_dict()
    quality = describe(front.quality)
    costs = " and ".join(
        value(float(best[name]), metric=describe(name)).replace(" /s", " tokens/s") for name in front.costs
    )
    label = cell_label({name: str(best[name]) for name in front.design.cell_keys}, separator=", ")
    if len(front.cells) == 1:
        return f"{value(float(best[front.quality]), metric=quality)} {quality.label}, at {costs}."
    count = int(front.cells["undominated"].sum())
    rest = (
        "no other setting is better in any of these"
        if count == 1
        else f"{count} of {len(front.cells)} settings are undominated"
    )
    reached = value(float(best[front.quality]), metric=quality)
    return f"best {quality.label} {reached} with {label}, at {costs}; {rest}."


def _factor_lines(effects: pd.DataFrame, *, quality: str | None) -> list[str]:
    """One sentence a factor: its last level against its first."""
    lines = []
    wanted = [name for name in (quality, "step_s", "peak_alloc_bytes") if name is not None]
    for factor in effects["factor"].drop_duplicates():
        rows = effects[effects["factor"] == factor]
        level = rows["level"].iloc[-1]
        last = rows[(rows["level"] == level) & (rows["n_pairs"] > 0)].to_dict("records")
        found = {str(row["metric"]): row for row in last}
        told = [change(found[name], metric=describe(name)) for name in wanted if name in found]
        if told:
            pairs = max(int(found[name]["n_pairs"]) for name in wanted if name in found)
            phrase = _PHRASES.get(str(factor), f"{plain(factor, limit=60)} {{level}} instead of {{against}}")
            names = {"level": plain(level, limit=40), "against": plain(rows["against"].iloc[-1], limit=40)}
            lines.append(f"{_fill(phrase, names)}: {', '.join(told)} ({_count(pairs, 'matched pair')}).")
    return lines


def _peer_lines(comparison: Comparison) -> list[str]:
    """Ours beside the best peer at the longest length, and where implementations become faster than SDPA."""
    where = f" ({cell_label(comparison.setting, separator=', ')})" if comparison.setting else ""
    lines = []
    told = [row for row in comparison.rows if row.layer == OURS and "ratio_to_best_peer" in row.values]
    if told:
        longest = told[-1]
        both, forward = (longest.values.get(f"ratio_to_best_peer{suffix}") for suffix in ("", ".forward"))
        share = longest.values.get("share_of_floor")
        assert both is not None
        bounds = ""
        if math.isfinite(both.low) and both.low > 0:
            bounds = " " + interval(math.log(both.low), math.log(both.high), scale="log_ratio")
        floor = (
            ""
            if share is None
            else f", at {value(share.mean, metric=describe('share_of_floor'))} of its floor"
        )
        alone = "" if forward is None else f" ({ratio(forward.mean)} forward alone)"
        lines.append(
            f"our {comparison.words.subject} is {ratio(both.mean)}{bounds} as fast as the best peer at "
            f"{longest.length:,} tokens, {comparison.words.step}{alone}{floor}{where}."
        )
    crossings = [found for found in comparison.crossovers() if found.metric == "step_s"]
    if crossings:
        places = "; ".join(f"{plain(found.layer, limit=40)} {found.words}" for found in crossings)
        lines.append(f"crossover with {SDPA}, {comparison.words.step}{where}: {places}.")
    return lines


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _fill(phrase: str, names: Mapping[str, str]) -> str:
    # Not str.format: a factor's own key may hold braces.
    for name, text in names.items():
        phrase = phrase.replace(f"{{{name}}}", text)
    return phrase


def _control_lines(trials: pd.DataFrame) -> list[str]:
    quality = quality_column(trials)
    if quality is None:
        return []
    done = trials[trials["outcome"] == "ok"]
    metric = describe(quality)
    words = {
        "full": "full attention",
        "oracle": "the keys of largest logit",
        "random": "random buckets",
        "knock_out": "no attention",
    }
    means = {
        text: float(done[f"{quality}@attention={control}"].mean())
        for control, text in words.items()
        if f"{quality}@attention={control}" in done.columns
    }
    told = [
        f"{value(mean, metric=metric)} with {text}" for text, mean in means.items() if math.isfinite(mean)
    ]
    if not told or not math.isfinite(as_trained := float(done[quality].mean())):
        return []
    floors = [
        f"{describe(name).label} is {value(float(done[name].mean()), metric=metric)}"
        for name in FLOORS
        if quality == "accuracy" and name in done.columns and done[name].notna().any()
    ]
    ending = f" ({', '.join(floors)})" if floors else ""
    return [
        f"the trained weights reach {value(as_trained, metric=metric)} {metric.label} as trained on average, "
        f"{', '.join(told)}{ending}."
    ]


def _incomplete(
    trials: pd.DataFrame, *, unreadable: Sequence[Unreadable], info: Mapping[str, Any]
) -> list[str]:
    lines = []
    planned = info.get("planned")
    if isinstance(planned, list):
        open_trials = len({str(entry) for entry in planned} - set(trials["trial_id"]))
        if open_trials:
            lines.append(f"{open_trials} of {len(planned)} planned trials have no record yet.")
    counts = trials["outcome"].value_counts()
    bad = [
        f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES[1:] if status in counts.index
    ]
    if bad:
        n_bad = int((trials["outcome"] != "ok").sum())
        lines.append(f"{n_bad} of {_count(len(trials), 'trial')} did not end well: {', '.join(bad)}.")
    if unreadable:
        lines.append(f"{_count(len(unreadable), 'file')} among the records could not be read.")
    if not info:
        lines.append("study.json is missing or torn: what was planned is not known.")
    return lines


def _mixed(records: Sequence[TrialRecord]) -> list[str]:
    measured = [record for record in records if record.outcome.status != "invalid"]
    lines = []
    codes = sorted({record.code for record in measured})
    if len(codes) > 1:
        shown = ", ".join(plain(code, limit=12) for code in codes[:5])
        lines.append(
            f"The trials were measured with {len(codes)} versions of the code ({shown}): "
            "differences between them may come from the code."
        )
    for name in MACHINE:
        if name == "threads" and len({record.spec.get("threads") for record in measured}) > 1:
            continue
        found = sorted({str(record.environment[name]) for record in measured if name in record.environment})
        if len(found) > 1:
            shown = "; ".join(plain(text, limit=60) for text in found[:5])
            lines.append(
                f"Several values of {name}: {shown}. Times and memory of these trials are not comparable."
            )
    return lines


def _disturbed(trials: pd.DataFrame, *, records: Sequence[TrialRecord]) -> list[str]:
    """Times that others had a hand in."""
    lines = []
    shared = sum(record.environment.get("timing") == "shared" for record in records)
    if shared:
        lines.append(
            f"{_count(shared, 'trial')} of {len(records)} ran while others could (timing=shared): "
            "their times say little."
        )
    if "others_cpu" in trials.columns:
        worst = trials["others_cpu"].max()
        count = int((trials["others_cpu"] > DISTURBED).sum())
        if count:
            lines.append(
                f"Others used more than {DISTURBED:.0%} of the CPUs in {_count(count, 'trial')} of "
                f"{int(trials['others_cpu'].notna().sum())} timed ones (at most {worst:.0%}): "
                "their times are less certain."
            )
    return lines


def _eval_sets(trials: pd.DataFrame, *, records: Sequence[TrialRecord]) -> list[str]:
    """Trials of one task and seed must share their evaluation set."""
    names = [name for name in trials.columns if name in ("task", "seed") or name.startswith("task.")]
    hashes = pd.Series(
        {record.trial_id: record.theory.get("evaluation_sha256") for record in records}, dtype=object
    ).reindex(trials["trial_id"])
    frame = level_texts(trials, names).assign(_sha=hashes.to_numpy())
    if not names or frame["_sha"].isna().all():
        return []
    if frame.groupby(names)["_sha"].nunique().max() > 1:
        return [
            "Trials of one task and seed were evaluated on different data: their quality is not comparable."
        ]
    return []


def _near_floor(trials: pd.DataFrame, *, task: str) -> list[str]:
    """A model that has learned nothing says nothing on the quality of its settings."""
    floors = [name for name in FLOORS if name in trials.columns]
    if quality_column(trials) != "accuracy" or not floors:
        return []
    floor = trials[floors].max(axis="columns")
    learned = trials["accuracy"] > floor + LEARNED
    known = trials["accuracy"].notna() & floor.notna()
    count = int((known & ~learned).sum())
    if count == 0:
        return []
    of = _count(int(known.sum()), "trial")
    name = plain(task, limit=40)
    return [f"{name}: accuracy is at chance or majority in {count} of {of}: they say nothing on quality."]


def _design_lines(trials: pd.DataFrame, *, task: str, factors: Mapping[str, Sequence[str]]) -> list[str]:
    design = design_of(trials, factors=factors)
    lines = []
    name = plain(task, limit=40)
    if design.blocks:
        told = ", ".join(plain(key, limit=60) for key in design.blocks)
        lines.append(f"{name}: matched pairs keep equal, though nobody swept it: {told}.")
    if design.followers:
        told = ", ".join(plain(key, limit=60) for key in design.followers)
        lines.append(f"{name}: changed along with a swept factor, as a part of its effect: {told}.")
    return lines + _unbalanced(trials, design=design, name=name)


def _unbalanced(trials: pd.DataFrame, *, design: Design, name: str) -> list[str]:
    whole = math.prod(len(factor.levels) for factor in design.factors)
    keys = [factor.name for factor in design.factors]
    if len(keys) < 2:
        return []
    there = len(level_texts(trials, keys).drop_duplicates())
    if there == whole:
        return []
    return [
        f"{name}: {there} of the {whole} combinations of levels were run; means over levels are not balanced."
    ]


def _lost_pairs(effects: pd.DataFrame) -> list[str]:
    lost = effects[effects["n_lost"] > 0]
    if lost.empty:
        return []
    worst = lost.groupby("factor", sort=False)["n_lost"].max()
    told = ", ".join(f"{count} for {short_name(str(factor))}" for factor, count in worst.items())
    return [f"Pairs lost because one of the two trials has no number (it failed, say): {told}."]


def _one_seed(trials: pd.DataFrame) -> list[str]:
    if "seed" in trials.columns and not trials.empty and trials["seed"].nunique() == 1:
        return ["One seed only: intervals tell how an effect varies between settings, not between seeds."]
    return []
