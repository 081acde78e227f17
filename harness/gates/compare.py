"""Verdicts on two sides: pure functions from trials and margins to a result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from harness.errors import (
    EXIT_INCOMPARABLE,
    EXIT_INCONCLUSIVE,
    EXIT_MISSING,
    EXIT_OK,
)
from harness.factors import level_text
from harness.gates.margins import HIGHER_IS_BETTER, Margin, Margins
from harness.gates.side import FINGERPRINT, TIMING_FINGERPRINT, Trial, cells
from harness.statistics import t_interval

Numbers = NDArray[np.float64]

#: Exit code of a regression: the same number as a failed run.
EXIT_REGRESSED = 1
#: From the worst to the best, as a table shows them.
VERDICTS = ("regressed", "missing", "incomparable", "inconclusive", "improved", "equivalent")
_EXITS = {
    "missing": EXIT_MISSING,
    "regressed": EXIT_REGRESSED,
    "incomparable": EXIT_INCOMPARABLE,
    "inconclusive": EXIT_INCONCLUSIVE,
}
#: If several apply, the first of these is the exit code.
_PRECEDENCE = (EXIT_REGRESSED, EXIT_MISSING, EXIT_INCOMPARABLE, EXIT_INCONCLUSIVE)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The verdict on one metric of one cell.

    Args:
        baseline: the metric on that side; the mean over seeds, or the seed that got worst.
        ratio: current over baseline.
        low: lower end of the interval of the change (positive: grew) in the unit of `scale`.
        decides: whether it counts for the exit code.
        note: what a reader should know of it.
    """

    experiment: str
    cell: Mapping[str, str]
    metric: str
    verdict: str
    scale: str = "ratio"
    baseline: float = math.nan
    current: float = math.nan
    ratio: float = math.nan
    low: float = math.nan
    high: float = math.nan
    margin: float = math.nan
    seeds: int = 0
    decides: bool = True
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A metric on both sides, and the interval of its change in the unit of its margin."""

    current: float
    baseline: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Changed:
    """A setting outside the cell that differs between the two sides."""

    experiment: str
    cell: Mapping[str, str]
    setting: str
    baseline: str
    current: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All verdicts, the worst first, and the settings that changed."""

    verdicts: tuple[Verdict, ...]
    changed: tuple[Changed, ...]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regression, 3 incomparable, 4 missing or failed trials, 5 inconclusive."""
        codes = {
            _EXITS[entry.verdict] for entry in self.verdicts if entry.decides and entry.verdict in _EXITS
        }
        return next((code for code in _PRECEDENCE if code in codes), EXIT_OK)


def compare(
    current: Sequence[Trial],
    baseline: Sequence[Trial],
    *,
    margins: Margins,
    timing: bool = False,
    unreadable: Sequence[str] = (),
) -> Comparison:
    """Every metric of every cell of either side.

    Args:
        unreadable: files among the records that are none, in words; each counts as a missing trial.
        timing: let times decide, where both sides were measured on equal machines.
    """
    ours, theirs = cells(current), cells(baseline)
    verdicts = [
        Verdict(experiment="", cell={}, metric="record", verdict="missing", note=note) for note in unreadable
    ]
    changed: list[Changed] = []
    for key in sorted(ours.keys() | theirs.keys()):
        here, there = ours.get(key, []), theirs.get(key, [])
        pairs, lost = _pair(here, there)
        verdicts += lost
        if pairs:
            verdicts += _cell_verdicts(pairs, margins=margins, timing=timing)
            changed += _changed(*pairs[0])
    if not verdicts:
        verdicts.append(
            Verdict(
                experiment="",
                cell={},
                metric="trials",
                verdict="missing",
                note="nothing to compare on either side",
            )
        )
    verdicts.sort(key=lambda entry: (not entry.decides, VERDICTS.index(entry.verdict)))
    return Comparison(verdicts=tuple(verdicts), changed=tuple(changed))


def judge(*, low: float, high: float, margin: Margin, higher_is_better: bool) -> str:
    """The verdict on an interval of a change; a change that is not known is inconclusive."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "inconclusive"
    worse_low, worse_high = (-high, -low) if higher_is_better else (low, high)
    # A change of exactly the margin is allowed, whatever the last bit says.
    slack = 1e-9 * max(1.0, margin.margin)
    if worse_low > margin.margin + slack:
        return "regressed"
    if worse_high < -margin.margin - slack:
        return "improved"
    if -margin.equivalence - slack <= worse_low and worse_high <= margin.equivalence + slack:
        return "equivalent"
    return "inconclusive"


def _pair(here: Sequence[Trial], there: Sequence[Trial]) -> tuple[list[tuple[Trial, Trial]], list[Verdict]]:
    """Trials of one cell by replicate; those without a partner, and failed ones, as verdicts."""
    ours = {trial.replicate: trial for trial in here}
    theirs = {trial.replicate: trial for trial in there}
    pairs, verdicts = [], []
    for replicate in sorted(ours.keys() | theirs.keys()):
        current, baseline = ours.get(replicate), theirs.get(replicate)
        if current is not None and baseline is not None and current.outcome == baseline.outcome == "ok":
            pairs.append((current, baseline))
            continue
        known = current or baseline
        if known is not None:
            verdict, note = _outcome_verdict(current, baseline)
            verdicts.append(
                Verdict(
                    experiment=known.experiment,
                    cell=known.cell,
                    metric="outcome",
                    verdict=verdict,
                    note=f"{replicate}: {note}",
                )
            )
    return pairs, verdicts


def _outcome_verdict(current: Trial | None, baseline: Trial | None) -> tuple[str, str]:
    if current is None:
        return "missing", "not in the current study"
    if baseline is None:
        return "missing", f"not in the baseline (current: {_words(current)})"
    if current.outcome == "ok":
        return "improved", f"finished; the baseline was {_words(baseline)}"
    if current.outcome == baseline.outcome and current.outcome not in ("error", "killed"):
        return "equivalent", f"{_words(current)} on both sides"
    return "missing", f"{_words(current)}; the baseline was {_words(baseline)}"


def _words(trial: Trial) -> str:
    return trial.outcome.replace("_", " ")


def _cell_verdicts(pairs: Sequence[tuple[Trial, Trial]], *, margins: Margins, timing: bool) -> list[Verdict]:
    first = pairs[0][0]
    differing = _differing(pairs, names=FINGERPRINT)
    other_machine = _differing(pairs, names=(*FINGERPRINT, *TIMING_FINGERPRINT))
    verdicts = []
    for name in _gated(pairs, margins=margins):
        margin = margins.of(name)
        assert margin is not None
        is_timing = margin.kind == "timing"
        have = [pair for pair in pairs if all(name in trial.metrics for trial in pair)]
        blank = Verdict(
            experiment=first.experiment,
            cell=first.cell,
            metric=name,
            verdict="missing",
            scale=margin.scale,
            margin=margin.margin,
            seeds=len(have),
            decides=timing or not is_timing,
        )
        if len(have) < len(pairs):
            lacking = "current" if any(name not in current.metrics for current, _ in pairs) else "baseline"
            note = f"not measured in the {lacking} study for {len(pairs) - len(have)} of {len(pairs)} seeds"
            verdicts.append(replace(blank, note=note))
            continue
        change = _change(have, name=name, margin=margin, margins=margins)
        told = replace(
            blank,
            current=change.current,
            baseline=change.baseline,
            ratio=change.current / change.baseline if change.baseline else math.nan,
            low=change.low,
            high=change.high,
            note=change.note,
        )
        reason = other_machine if is_timing else differing
        if reason:
            # An interval would look like a finding.
            verdicts.append(replace(told, verdict="incomparable", low=math.nan, high=math.nan, note=reason))
            continue
        verdict = judge(
            low=change.low, high=change.high, margin=margin, higher_is_better=name in HIGHER_IS_BETTER
        )
        verdicts.append(replace(told, verdict=verdict))
    return verdicts


def _gated(pairs: Sequence[tuple[Trial, Trial]], *, margins: Margins) -> list[str]:
    """Metrics that are judged: those with a margin, of the qualities only the task's own."""
    quality = pairs[0][0].quality
    names = dict.fromkeys(name for pair in pairs for trial in pair for name in trial.metrics)
    order = {name: index for index, name in enumerate(margins.metrics)}
    chosen = []
    for name in names:
        margin = margins.of(name)
        if margin is not None and (margin.kind != "paired" or name == quality):
            chosen.append(name)
    return sorted(chosen, key=lambda name: (order[name.partition(".")[0]], name))


def _differing(pairs: Sequence[tuple[Trial, Trial]], *, names: Sequence[str]) -> str:
    """In words, what of the fingerprints differs; empty if nothing does."""
    told = {}
    for current, baseline in pairs:
        for name in names:
            ours, theirs = current.fingerprint.get(name), baseline.fingerprint.get(name)
            if ours != theirs:
                told[name] = f"{name} {ours or 'unknown'}, baseline {theirs or 'unknown'}"
    return "; ".join(told.values())


def _change(pairs: Sequence[tuple[Trial, Trial]], *, name: str, margin: Margin, margins: Margins) -> Change:
    ours = np.array([current.metrics[name] for current, _ in pairs], dtype=float)
    theirs = np.array([baseline.metrics[name] for _, baseline in pairs], dtype=float)
    factor = 100.0 if margin.scale == "points" else 1.0
    if margin.kind == "exact":
        if margin.scale == "ratio":
            changes = [_relative(current, baseline) for current, baseline in zip(ours, theirs, strict=True)]
        else:
            changes = list((ours - theirs) * factor)
        sign = -1.0 if name in HIGHER_IS_BETTER else 1.0
        worst = int(np.argmax([math.inf if math.isnan(change) else sign * change for change in changes]))
        low = high = changes[worst]
        return Change(current=ours[worst], baseline=theirs[worst], low=low, high=high)
    if margin.kind == "timing":
        low, high = _timing_interval(ours, theirs, margins=margins)
        return Change(current=_mean(ours), baseline=_mean(theirs), low=low, high=high)
    low, high, note = _paired_interval(pairs, ours - theirs, name=name, margins=margins)
    return Change(
        current=_mean(ours), baseline=_mean(theirs), low=low * factor, high=high * factor, note=note
    )


def _mean(values: Numbers) -> float:
    return float(values.mean())


def _relative(current: float, baseline: float) -> float:
    if current == baseline:
        return 0.0
    return current / baseline - 1.0 if baseline else math.inf


def _timing_interval(ours: Numbers, theirs: Numbers, *, margins: Margins) -> tuple[float, float]:
    """Relative change of a time; with few seeds its width follows from the spread between processes."""
    if not ((ours > 0).all() and (theirs > 0).all()):
        return math.nan, math.nan
    changes = np.log(ours / theirs)
    interval = t_interval(changes)
    low, high = interval.low, interval.high
    if interval.n < margins.min_seeds:
        half = 1.96 * math.sqrt(2 / interval.n) * margins.process_sd
        low, high = interval.mean - half, interval.mean + half
    return math.expm1(low), math.expm1(high)


def _paired_interval(
    pairs: Sequence[tuple[Trial, Trial]], differences: Numbers, *, name: str, margins: Margins
) -> tuple[float, float, str]:
    """Interval of the mean difference over seeds."""
    mean = _mean(differences)
    if not differences.any():
        return 0.0, 0.0, ""
    if len(differences) >= margins.min_seeds:
        interval = t_interval(differences)
        return interval.low, interval.high, ""
    seeds = "1 seed" if len(differences) == 1 else f"{len(differences)} seeds"
    if name != "accuracy" or not all(trial.scored > 0 for pair in pairs for trial in pair):
        return mean, mean, f"{seeds}: no interval"
    # Each side is a share of scored tokens; its seeds add up to one larger sample.
    variance = sum(
        max(0.0, trial.metrics[name] * (1 - trial.metrics[name])) / trial.scored
        for pair in pairs
        for trial in pair
    )
    half = 1.96 * math.sqrt(variance) / len(pairs)
    return mean - half, mean + half, f"{seeds}: interval of the evaluation sample"


def _changed(current: Trial, baseline: Trial) -> list[Changed]:
    """Settings that differ, of a cell that both sides have."""
    return [
        Changed(
            experiment=current.experiment,
            cell=current.cell,
            setting=name,
            baseline=_setting(baseline, name),
            current=_setting(current, name),
        )
        for name in sorted(current.settings.keys() | baseline.settings.keys())
        if _setting(current, name) != _setting(baseline, name)
    ]


def _setting(trial: Trial, name: str) -> str:
    return level_text(trial.settings[name]) if name in trial.settings else "not there"
