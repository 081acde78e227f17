"""Numbers and levels as people read them: MiB, ms, points, ×."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from harness.metrics.catalogue import Metric

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
#: What stands where a number was not measured.
NOTHING = "\N{EN DASH}"
#: Control characters, those that turn the direction of text, half surrogates, and what XML does not allow.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def value(number: float, *, metric: Metric) -> str:
    """A metric's value with its unit."""
    if not math.isfinite(number):
        return NOTHING if math.isnan(number) else signed(number)
    match metric.unit:
        case "fraction":
            return f"{100 * number:.1f} %"
        case "bytes":
            return mebibytes(number)
        case "s":
            return seconds(number)
        case "tokens/s":
            return f"{significant(number)} /s"
        case "flop":
            return f"{significant(number / 1e9)} GFLOP"
        case "flop/s":
            return f"{significant(number / 1e9)} GFLOP/s"
        case "ratio":
            return ratio(number)
        case "count":
            return f"{number:,.0f}"
        case "bits" | "nats":
            return f"{number:.3f}"
        case _:
            return significant(number)


def mebibytes(number: float) -> str:
    """Bytes as MiB."""
    return f"{significant(number / 2**20)} MiB"


def seconds(number: float) -> str:
    """A duration, in milliseconds below one second."""
    if abs(number) < 1:
        return f"{significant(1000 * number)} ms"
    return f"{significant(number)} s"


def duration(number: float) -> str:
    """A long duration in minutes and hours."""
    if not math.isfinite(number):
        return NOTHING
    if number < 100:
        return f"{number:.0f} s"
    minutes = round(number / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def significant(number: float, *, digits: int = 3) -> str:
    """Plain digits, at least three that count, thousands apart."""
    if not math.isfinite(number):
        return signed(number)
    if number == 0:
        return "0"
    exponent = math.floor(math.log10(abs(number)))
    if exponent < -4:
        return f"{number:.{digits - 1}e}".replace("-", MINUS)
    decimals = max(0, digits - 1 - exponent)
    return f"{number:,.{decimals}f}".replace("-", MINUS)


def signed(number: float, *, decimals: int = 1) -> str:
    """A difference with its sign; what rounds to zero has none."""
    if math.isnan(number):
        return NOTHING
    if math.isinf(number):
        return "∞" if number > 0 else f"{MINUS}∞"
    text = f"{number:+.{decimals}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", MINUS)


def ratio(number: float) -> str:
    """A factor: `2.6×`."""
    if not math.isfinite(number):
        return NOTHING
    if number >= 100:
        return f"{number:,.0f}{TIMES}"
    if number >= 10:
        return f"{number:.1f}{TIMES}"
    return f"{number:.2f}{TIMES}" if number < 2 else f"{number:.1f}{TIMES}"


def effect(number: float, *, scale: str) -> str:
    """An effect in the words of its scale."""
    if not math.isfinite(number):
        return NOTHING
    match scale:
        case "points":
            return f"{signed(number)} points"
        case "log_ratio":
            return ratio(math.exp(number))
        case _:
            return signed(number, decimals=3)


def interval(low: float, high: float, *, scale: str) -> str:
    """An interval on an effect, in brackets; empty where there is none."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    match scale:
        case "points":
            return f"[{signed(low)}, {signed(high)}]"
        case "log_ratio":
            return f"[{ratio(math.exp(low))}, {ratio(math.exp(high))}]".replace(TIMES, "")
        case _:
            return f"[{signed(low, decimals=3)}, {signed(high, decimals=3)}]"


def plain(text: object, *, limit: int | None = None) -> str:
    """Any text on one line: control characters shown as `\\x1b`, cut to a length."""
    shown = _UNPRINTABLE.sub(
        lambda match: match[0].encode("unicode_escape", "backslashreplace").decode(), str(text)
    )
    if limit is not None and len(shown) > limit:
        return f"{shown[: limit - 1]}…"
    return shown


def short_name(factor: str) -> str:
    """The last part of a factor's key, as in `n_hashes`."""
    return plain(factor.rpartition(".")[2], limit=40)


def cell_label(levels: Mapping[str, str], *, separator: str = " · ") -> str:
    """A setting on one line: short names with levels."""
    # A name and its level stay on one line.
    pairs = (f"{short_name(name)} {plain(level, limit=40)}" for name, level in levels.items())
    return separator.join(pair.replace(" ", "\N{NO-BREAK SPACE}") for pair in pairs)
