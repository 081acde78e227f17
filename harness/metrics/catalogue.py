"""What is known about a metric's column: words, unit, which way is better, and how changes are told."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

from harness.metrics.names import split_column

Unit = Literal["fraction", "bytes", "s", "tokens/s", "flop", "flop/s", "count", "bits", "nats", "ratio", ""]
Better = Literal["higher", "lower", ""]
#: `points`: difference in hundredths; `absolute`: difference in the unit; `log_ratio`: log of the ratio.
Scale = Literal["points", "absolute", "log_ratio", ""]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A column's meaning.

    Args:
        scale: how an effect on it is told; empty for what is no outcome (a floor, a count of tokens).
    """

    name: str
    label: str
    unit: Unit = ""
    better: Better = ""
    scale: Scale = ""


def _cost(name: str, label: str, unit: Unit) -> Metric:
    return Metric(name=name, label=label, unit=unit, better="lower", scale="log_ratio")


KNOWN = {
    metric.name: metric
    for metric in (
        Metric(name="accuracy", label="accuracy", unit="fraction", better="higher", scale="points"),
        Metric(name="bits_per_byte", label="bits per byte", unit="bits", better="lower", scale="absolute"),
        Metric(name="loss", label="evaluation loss", unit="nats", better="lower", scale="absolute"),
        Metric(name="recall", label="recall", unit="fraction", better="higher", scale="points"),
        Metric(
            name="bucket_entropy_bits", label="bucket entropy", unit="bits", better="higher", scale="absolute"
        ),
        _cost("bucket_max_over_mean", "fullest bucket over the mean", ""),
        _cost("peak_alloc_bytes", "peak memory", "bytes"),
        _cost("saved_bytes", "saved for backward", "bytes"),
        _cost("peak_rss_bytes", "peak resident memory", "bytes"),
        _cost("peak_reserved_bytes", "peak reserved memory", "bytes"),
        Metric(name="tokens_per_s", label="throughput", unit="tokens/s", better="higher", scale="log_ratio"),
        _cost("step_s", "step time", "s"),
        _cost("forward_s", "forward time", "s"),
        _cost("backward_s", "backward time", "s"),
        _cost("optimizer_s", "optimizer time", "s"),
        _cost("flops", "FLOPs per step", "flop"),
        _cost("operators", "operators per step", "count"),
        Metric(
            name="share_of_floor",
            label="share of the floor",
            unit="fraction",
            better="higher",
            scale="points",
        ),
        Metric(
            name="ratio_to_best_peer",
            label="speed as a multiple of the best peer's",
            unit="ratio",
            better="higher",
        ),
        Metric(name="ratio_to_sdpa", label="speed as a multiple of SDPA's", unit="ratio", better="higher"),
        Metric(name="recall_lost_to_hash_miss", label="recall lost to hash misses", unit="fraction"),
        Metric(name="recall_lost_to_overflow", label="recall lost to full buckets", unit="fraction"),
        Metric(name="recall_lost_to_cut", label="recall lost to chunk borders", unit="fraction"),
        Metric(name="recall_gained_at_seams", label="recall gained at seams", unit="fraction"),
        Metric(name="output_error", label="output error beside full attention", unit="ratio", better="lower"),
        Metric(name="causality_leak", label="earlier outputs that the future moves", unit="fraction"),
        Metric(name="reconstruction_error", label="reconstruction error", unit="ratio", better="lower"),
        Metric(name="gradient_cosine", label="cosine to the kept gradient", unit="ratio", better="higher"),
        Metric(name="flops_residual", label="FLOPs beyond the cost model's", unit="fraction"),
        Metric(name="saved_bytes_residual", label="saved bytes beyond the cost model's", unit="fraction"),
        Metric(name="peak_alloc_bytes_residual", label="peak beyond the cost model's", unit="fraction"),
        Metric(name="others_cpu", label="CPU taken by others", unit="fraction"),
        Metric(name="floor_s", label="floor", unit="s"),
        Metric(name="gemm_flop_per_s", label="rate of matrix products", unit="flop/s"),
        Metric(name="parameters", label="parameters", unit="count"),
        Metric(name="solved", label="solved", unit="fraction", better="higher"),
        Metric(name="steps_to_solved", label="steps to solve the task", unit="count", better="lower"),
        Metric(name="final_loss", label="final training loss", unit="nats", better="lower"),
        Metric(name="chance_accuracy", label="chance", unit="fraction"),
        Metric(name="majority_accuracy", label="majority", unit="fraction"),
    )
}

_UNIT_BY_SUFFIX: tuple[tuple[str, Unit], ...] = (
    ("_tokens_per_s", "tokens/s"),
    ("_bytes", "bytes"),
    ("_s", "s"),
    ("_accuracy", "fraction"),
    ("_nats", "nats"),
)


@functools.lru_cache(maxsize=4096)
def describe(column: str) -> Metric:
    """The meaning of a column; a name nobody knows gets its unit from its suffix."""
    name, phase, setting = split_column(column)
    known = KNOWN.get(name)
    if known is None:
        known = Metric(name=name, label=name.replace("_", " "), unit=_unit(name))
    words = [known.label]
    if phase:
        words.append(phase)
    words.extend(f"{key}={value}" for key, value in setting.items())
    return replace(known, name=column, label=", ".join(words))


def _unit(name: str) -> Unit:
    for suffix, unit in _UNIT_BY_SUFFIX:
        if name.endswith(suffix):
            return unit
    return ""


def effect_columns() -> tuple[str, ...]:
    """The columns whose change by a factor is worth telling, in the order of the tables."""
    return tuple(name for name, metric in KNOWN.items() if metric.scale)
