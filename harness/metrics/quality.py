"""How good the model is: accuracy, loss and bits per byte from sums over the fixed evaluation set."""

from __future__ import annotations

import math
from collections import defaultdict

from harness.metrics.names import pooled_setting
from harness.record import TrialRecord

#: Samples that become columns here.
METRICS = frozenset({"correct", "scored", "nll_nats"})
#: Accuracies that need no model.
FLOORS = ("chance_accuracy", "majority_accuracy")
#: An accuracy that is not this much above both has not been learned.
LEARNED = 0.02
QUALITIES = ("accuracy", "bits_per_byte")
#: A trial of so high an accuracy has solved its task.
SOLVED = 0.9
#: Training has, once so many losses in a row are below this share of a guess's.
_SOLVED_LOSS, _IN_A_ROW = 0.1, 5


def columns(record: TrialRecord) -> dict[str, float]:
    """Quality as trained, then under every other evaluation setting, pooled over hash seeds."""
    sums: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sample in record.samples:
        if sample.metric in METRICS:
            sums[pooled_setting(sample.at)][sample.metric] += sum(sample.values)
    in_bits = quality_of(record) == "bits_per_byte"
    result: dict[str, float] = {}
    for setting in sorted(sums, key=lambda name: (name != "", name)):
        for metric, value in _ratios(sums[setting], in_bits=in_bits).items():
            result[f"{metric}{setting}"] = value
    final = _final_loss(record)
    if final is not None:
        result["final_loss"] = final
    for floor in FLOORS:
        known = record.theory.get(floor)
        if isinstance(known, (int, float)):
            result[floor] = float(known)
    if quality_of(record) == "accuracy" and {"accuracy", "chance_accuracy"} <= result.keys():
        result["solved"] = float(result["accuracy"] >= SOLVED)
        steps = _steps_to_solved(record)
        if steps is not None:
            result["steps_to_solved"] = float(steps)
    return result


def _steps_to_solved(record: TrialRecord) -> int | None:
    """Training steps up to the first loss of a row of small ones; None if there is none, or no chance known.

    Small is a tenth of what guessing costs, −ln of the chance to be right.
    """
    chance, losses = record.theory.get("chance_accuracy"), record.series.get("train", {}).get("loss", [])
    if not isinstance(chance, (int, float)) or not 0 < chance < 1:
        return None
    small = 0
    for step, loss in enumerate(losses):
        small = small + 1 if loss <= -_SOLVED_LOSS * math.log(chance) else 0
        if small == _IN_A_ROW:
            return step - _IN_A_ROW + 2
    return None


def quality_of(record: TrialRecord) -> str:
    """The column that says how good this trial is: `accuracy` or `bits_per_byte`."""
    named = record.theory.get("quality")
    return named if named in QUALITIES and isinstance(named, str) else "accuracy"


def by_hash_seed(record: TrialRecord) -> dict[str, tuple[float, ...]]:
    """The quality under each hash seed, for every setting that was evaluated with several."""
    quality = quality_of(record)
    sums: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sample in record.samples:
        if "hash_seed" in sample.at and sample.metric in METRICS:
            setting = pooled_setting(sample.at)
            sums[setting, str(sample.at["hash_seed"])][sample.metric] += sum(sample.values)
    result: dict[str, list[float]] = defaultdict(list)
    for (setting, _), parts in sums.items():
        ratios = _ratios(parts, in_bits=quality == "bits_per_byte")
        if quality in ratios:
            result[f"{quality}{setting}"].append(ratios[quality])
    return {column: tuple(values) for column, values in result.items() if len(values) > 1}


def _ratios(sums: dict[str, float], *, in_bits: bool) -> dict[str, float]:
    scored = sums.get("scored", 0.0)
    if not scored > 0:
        return {}
    result = {}
    if "correct" in sums:
        result["accuracy"] = sums["correct"] / scored
    if "nll_nats" in sums:
        result["loss"] = sums["nll_nats"] / scored
        if in_bits:
            result["bits_per_byte"] = result["loss"] / math.log(2)
    return result


def _final_loss(record: TrialRecord) -> float | None:
    losses = record.series.get("train", {}).get("loss", [])
    if losses:
        return float(losses[-1])
    try:
        return float.fromhex(record.outcome.checksum)
    except ValueError:
        return None
