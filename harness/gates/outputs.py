"""A comparison as people and machines read it: terminal, JSON, Markdown, JUnit, GitHub."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from harness.errors import EXIT_OK
from harness.formatting import NOTHING, cell_label, plain, signed, value
from harness.gates.compare import VERDICTS, Changed, Comparison, Verdict
from harness.metrics.catalogue import describe

_HEADERS = ("verdict", "cell", "metric", "baseline", "current", "change", "margin", "note")
#: Columns of numbers, which are flush right.
_NUMBERS = (3, 4, 5, 6)


def terminal(comparison: Comparison, *, hints: Sequence[str]) -> str:
    """A table, the worst first, then what changed and what to do."""
    lines = []
    deciding = [entry for entry in comparison.verdicts if entry.decides]
    shown = [entry for entry in comparison.verdicts if not entry.decides]
    lines += _aligned([_HEADERS, *_rows(deciding)])
    if shown:
        lines += ["", "Times (shown, not judged; the two sides were not interleaved):"]
        lines += _aligned([_HEADERS, *_rows(shown)])
    if comparison.changed:
        lines += ["", "Changed settings:", *(f"  {line}" for line in changed_lines(comparison.changed))]
    return "\n".join([*lines, "", *hints, verdict_line(comparison)])


def verdict_line(comparison: Comparison) -> str:
    """The result in one line."""
    counts = Counter(entry.verdict for entry in comparison.verdicts if entry.decides)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    word = "PASS" if comparison.exit_code == EXIT_OK else "FAIL"
    return f"{word} (exit {comparison.exit_code}): {told}"


def changed_lines(changed: Sequence[Changed]) -> list[str]:
    """Settings outside the cells that differ, once each."""
    found: dict[tuple[str, str, str], int] = {}
    for entry in changed:
        key = (entry.setting, entry.baseline, entry.current)
        found[key] = found.get(key, 0) + 1
    return [
        f"{plain(setting, limit=60)}: {plain(before, limit=60)} → {plain(after, limit=60)} "
        f"({count} {'cell' if count == 1 else 'cells'})"
        for (setting, before, after), count in found.items()
    ]


def as_json(comparison: Comparison, *, reason: str = "", exit_code: int | None = None) -> str:
    """`{exit, cells: [{cell, metric, baseline, current, ratio, low, high, margin, verdict}]}` and more."""
    code = comparison.exit_code if exit_code is None else exit_code
    data: dict[str, Any] = {"exit": code, "cells": [_plain_entry(entry) for entry in comparison.verdicts]}
    data["changed_settings"] = [
        {
            "experiment": entry.experiment,
            "cell": dict(entry.cell),
            "setting": entry.setting,
            "baseline": entry.baseline,
            "current": entry.current,
        }
        for entry in comparison.changed
    ]
    if reason:
        data["reason"] = reason
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def markdown(comparison: Comparison, *, hints: Sequence[str]) -> str:
    """The same as a pipe table."""
    lines = [f"**{escape(verdict_line(comparison))}**", ""]
    for title, decides in (("", True), ("Times (shown, not judged)", False)):
        rows = _rows([entry for entry in comparison.verdicts if entry.decides == decides])
        if not rows:
            continue
        lines += [f"{title}", ""] if title else []
        lines += [f"| {' | '.join(_HEADERS)} |", "|:--|:--|:--|--:|--:|--:|--:|:--|"]
        lines += [f"| {' | '.join(escape(text) for text in row)} |" for row in rows]
        lines.append("")
    if comparison.changed:
        lines += [
            "Changed settings:",
            "",
            *(f"- {escape(line)}" for line in changed_lines(comparison.changed)),
            "",
        ]
    lines += [f"{escape(hint)}\n" for hint in hints if hint]
    return "\n".join(lines)


def junit(comparison: Comparison) -> str:
    """A test case for each verdict: failing if regressed, missing or incomparable."""
    suite = ElementTree.Element("testsuite", name="harness gate", tests=str(len(comparison.verdicts)))
    failures = skipped = 0
    for entry in comparison.verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=_name(entry), name=plain(entry.metric))
        message = plain(" ".join(f"{entry.verdict}: {_change_text(entry)} {entry.note}".split()))
        if not entry.decides:
            ElementTree.SubElement(case, "skipped", message=f"times do not decide; {message}")
            skipped += 1
        elif entry.verdict == "inconclusive":
            ElementTree.SubElement(case, "skipped", message=message)
            skipped += 1
        elif entry.verdict in ("regressed", "missing", "incomparable"):
            ElementTree.SubElement(case, "failure", message=message, type=entry.verdict)
            failures += 1
    suite.set("failures", str(failures))
    suite.set("skipped", str(skipped))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def github(comparison: Comparison, *, summary: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Annotations for what failed, and the summary of the step; nothing outside GitHub Actions."""
    if environment.get("GITHUB_ACTIONS") != "true":
        return []
    path = environment.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as stream:
            stream.write(summary)
    levels = {"regressed": "error", "missing": "error", "incomparable": "error", "inconclusive": "warning"}
    return [
        f"::{levels[entry.verdict]} title=harness gate::"
        + _annotation(
            f"{entry.verdict}: {_name(entry)} {entry.metric} {_change_text(entry)} {entry.note}".strip()
        )
        for entry in comparison.verdicts
        if entry.decides and entry.verdict in levels
    ]


def escape(text: str) -> str:
    """Text that stays one cell of a Markdown table."""
    escaped = re.sub(r"[\\`*|~$\[\]]|(?<!\w)_|_(?!\w)", r"\\\g<0>", plain(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _rows(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Findings one by one; of what is as it was, one row a metric."""
    folded: dict[tuple[str, str, str], list[Verdict]] = {}
    rows = []
    for entry in verdicts:
        if entry.verdict in ("regressed", "missing", "improved") or (
            entry.decides and entry.verdict != "equivalent"
        ):
            rows.append(_row(entry))
        else:
            folded.setdefault((entry.verdict, entry.metric, entry.note), []).append(entry)
    for entries in folded.values():
        rows.append(_row(entries[0]) if len(entries) == 1 else _folded_row(entries))
    return rows


def _folded_row(entries: Sequence[Verdict]) -> tuple[str, ...]:
    first = entries[0]
    changes = [change for entry in entries if math.isfinite(change := _middle(entry))]
    ends = [_amount(end, scale=first.scale) for end in (min(changes), max(changes))] if changes else []
    told = ends[0] if len(set(ends)) == 1 else " to ".join(ends)
    margin = _amount(first.margin, scale=first.scale, sign=False)
    return (
        first.verdict,
        f"{len(entries)} cells",
        plain(first.metric, limit=40),
        "",
        "",
        told,
        margin,
        _note(first),
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADERS))]
    return [
        "  ".join(
            text.rjust(width) if column in _NUMBERS else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _row(entry: Verdict) -> tuple[str, ...]:
    metric = describe(entry.metric)
    known = not math.isnan(entry.baseline) or not math.isnan(entry.current)
    return (
        entry.verdict,
        _name(entry),
        plain(entry.metric, limit=40),
        value(entry.baseline, metric=metric) if known else "",
        value(entry.current, metric=metric) if known else "",
        _change_text(entry),
        _amount(entry.margin, scale=entry.scale, sign=False),
        _note(entry),
    )


def _note(entry: Verdict) -> str:
    return plain(entry.note, limit=160)


def _name(entry: Verdict) -> str:
    label = cell_label(entry.cell, separator=" ").replace("\N{NO-BREAK SPACE}", " ")
    return plain(f"{entry.experiment}: {label}" if label else entry.experiment or NOTHING, limit=90)


def _change_text(entry: Verdict) -> str:
    if math.isnan(entry.low):
        return _amount(_middle(entry), scale=entry.scale)
    if entry.low == entry.high:
        return _amount(entry.low, scale=entry.scale)
    low, high = (_amount(end, scale=entry.scale) for end in (entry.low, entry.high))
    return f"[{low}, {high}]"


def _middle(entry: Verdict) -> float:
    """The change itself, without its interval, in the unit of the margin."""
    match entry.scale:
        case "ratio":
            return entry.ratio - 1
        case "points":
            return 100 * (entry.current - entry.baseline)
        case _:
            return entry.current - entry.baseline


def _amount(number: float, *, scale: str, sign: bool = True) -> str:
    """A change or a margin in the words of its scale."""
    if math.isnan(number):
        return ""
    amount, unit, decimals = {
        "ratio": (100 * number, " %", 2),
        "points": (number, " points", 2),
    }.get(scale, (number, "", 3))
    text = signed(amount, decimals=decimals)
    return f"{text if sign else text.lstrip('+')}{unit}"


def _plain_entry(entry: Verdict) -> dict[str, Any]:
    def finite(number: float) -> float | None:
        return number if math.isfinite(number) else None

    return {
        "experiment": entry.experiment,
        "cell": dict(entry.cell),
        "metric": entry.metric,
        "baseline": finite(entry.baseline),
        "current": finite(entry.current),
        "ratio": finite(entry.ratio),
        "low": finite(entry.low),
        "high": finite(entry.high),
        "margin": finite(entry.margin),
        "scale": entry.scale,
        "seeds": entry.seeds,
        "decides": entry.decides,
        "verdict": entry.verdict,
        "note": entry.note,
    }


def _annotation(text: str) -> str:
    return " ".join(plain(text).split()).replace("%", "%25")
