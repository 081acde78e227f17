"""How a quantity, its phase and its evaluation setting become one column name."""

from __future__ import annotations

import functools

from harness.record import At

#: Keys of an evaluation setting come in this order; any other key follows by name.
AT_ORDER = ("n_hashes", "attention", "hashing", "hash_seed")


def column_name(metric: str, *, phase: str | None = None, at: At | None = None) -> str:
    """`metric`, `metric.phase`, `metric@key=value,key=value`."""
    name = metric if phase is None else f"{metric}.{phase}"
    return f"{name}@{_setting(tuple(at), *map(str, at.values()))}" if at else name


@functools.lru_cache(maxsize=1024)
def _setting(keys: tuple[str, ...], *values: str) -> str:
    """The end of a column's name; a study has thousands of trials, but few settings."""
    at = dict(zip(keys, values, strict=True))
    known = [key for key in AT_ORDER if key in at]
    rest = sorted(key for key in at if key not in AT_ORDER)
    return ",".join(f"{key}={at[key]}" for key in [*known, *rest])


def pooled(at: At) -> At:
    """The setting with its hash seed left out: those are replicates of one setting."""
    if "hash_seed" not in at:
        return at
    rest = {key: value for key, value in at.items() if key != "hash_seed"}
    return rest or at


def pooled_setting(at: At) -> str:
    """The end of a column's name that stands for a setting with its hash seed left out."""
    return _pooled_setting(tuple(at), *map(str, at.values())) if at else ""


@functools.lru_cache(maxsize=1024)
def _pooled_setting(keys: tuple[str, ...], *values: str) -> str:
    return column_name("", at=pooled(dict(zip(keys, values, strict=True))))


def split_column(column: str) -> tuple[str, str | None, dict[str, str]]:
    """The parts of a column name: metric, phase, setting (values as text)."""
    name, _, setting = column.partition("@")
    metric, _, phase = name.partition(".")
    pairs = (pair.partition("=") for pair in setting.split(",") if pair)
    return metric, phase or None, {key: value for key, _, value in pairs}


def is_percentile(column: str) -> bool:
    """Whether a column is the tail of another one's distribution: `step_s.p90`."""
    _, phase, _ = split_column(column)
    return phase is not None and phase[:1] == "p" and phase[1:].isdigit()
