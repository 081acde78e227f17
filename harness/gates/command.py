"""`harness gate CURRENT --baseline NAME|STUDY`: has anything become worse?"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import store
from harness.arguments import Parser, parser_for
from harness.errors import EXIT_INCOMPARABLE, HarnessError, UsageError
from harness.formatting import plain
from harness.gates import outputs
from harness.gates.baseline import Side, open_side, side_of_study
from harness.gates.compare import Comparison, compare
from harness.gates.margins import read_margins
from harness.metrics.quality import FLOORS, LEARNED
from harness.paths import conf_dir

_EXITS = """
exit codes:
  0  pass
  1  regression
  2  wrong usage
  3  incomparable machines, or stale records
  4  missing or failed trials
  5  inconclusive
of several, the first of 2, 1, 4, 3, 5"""


class Stale(HarnessError):
    """The records were measured with other code than the checkout's."""

    exit_code = EXIT_INCOMPARABLE


def main(argv: Sequence[str] | None = None) -> int:
    """Compare a stored study with a baseline; the exit code is the verdict."""
    try:
        return _gate(_parser().parse_args(argv))
    except HarnessError as error:
        print(f"harness gate: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> Parser:
    parser = parser_for(
        "gate",
        description=(
            "Compare a stored study with a baseline. Allocator peak, saved bytes, FLOPs, operator count and\n"
            "quality decide; times are shown."
        ),
        examples=(
            "harness gate ci --baseline ci",
            "harness gate mine --baseline yesterday --timing --junit gate.xml",
        ),
        epilog=_EXITS,
    )
    parser.add_argument("current", help="name of the study to judge, or its folder")
    parser.add_argument(
        "--baseline", required=True, metavar="NAME|STUDY", help="a saved baseline, or a study"
    )
    parser.add_argument("--config", default="ci", metavar="NAME", help="margins: conf/gate/NAME.yaml (ci)")
    parser.add_argument("--timing", action="store_true", help="let times decide too, on equal machines")
    parser.add_argument(
        "--allow-stale",
        action="store_true",
        help="judge records of other code than the checkout's",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the verdicts as Markdown")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="write the verdicts as JUnit XML")
    return parser


def _gate(options: argparse.Namespace) -> int:
    margins = read_margins(conf_dir() / "gate" / f"{options.config}.yaml")
    current = side_of_study(store.open_study(options.results_dir, options.current))
    baseline = open_side(options.results_dir, options.baseline)
    if not options.allow_stale:
        reason = _stale(current)
        if reason:
            _write(options.json, outputs.as_json(_NOTHING, reason=reason, exit_code=EXIT_INCOMPARABLE))
            raise Stale(reason)
    comparison = compare(
        current.trials,
        baseline.trials,
        margins=margins,
        timing=options.timing,
        unreadable=(*current.unreadable, *(f"in the baseline: {entry}" for entry in baseline.unreadable)),
    )
    hints = _hints(comparison, current=current, baseline=baseline, timing=options.timing)
    summary = outputs.markdown(comparison, hints=hints)
    _write(options.json, outputs.as_json(comparison))
    _write(options.markdown, summary)
    _write(options.junit, outputs.junit(comparison))
    print(outputs.terminal(comparison, hints=hints))
    for line in outputs.github(comparison, summary=summary):
        print(line)
    return comparison.exit_code


_NOTHING = Comparison(verdicts=(), changed=())


def _stale(side: Side) -> str:
    """Why the records do not speak for the checkout; empty if they do."""
    # Imported here: it is the one thing a gate needs of the measuring side.
    from harness.environment import code_fingerprint

    code = code_fingerprint()
    stale = [trial for trial in side.trials if trial.code != code]
    if not stale:
        return ""
    return (
        f"{len(stale)} of {len(side.trials)} trials of {plain(side.name, limit=100)} were measured with "
        f"other code ({plain(stale[0].code, limit=40)}, the checkout is {code}); run them again with "
        "rerun=stale, or judge them all the same with --allow-stale"
    )


def _hints(comparison: Comparison, *, current: Side, baseline: Side, timing: bool) -> list[str]:
    found = {entry.verdict for entry in comparison.verdicts if entry.decides}
    again = f"harness baseline save {plain(current.name, limit=100)} --as {_baseline_name(baseline)}"
    hints = []
    if current.n_older:
        hints.append(f"{current.n_older} older trials of the same cells are left out.")
    if "incomparable" in found:
        hints.append(
            "Incomparable: bytes and counts are exact on equal machines only. Measure the baseline's code "
            f"here and save it again: {again}"
        )
    if "missing" in found:
        hints.append("Missing: each side must have every trial, finished, with every metric of the other.")
    if "inconclusive" in found:
        hints.append("Inconclusive: the interval reaches past what counts as equal; more seeds narrow it.")
    if "improved" in found and comparison.exit_code == 0:
        hints.append(f"Improved: keep it with {again}")
    unlearned = _unlearned(current, baseline)
    if unlearned:
        hints.append(
            f"{unlearned} of {len(current.trials)} trials are no better than chance or the majority on "
            "both sides: a fall of their accuracy cannot show. Train them longer, or on something easier."
        )
    if timing:
        hints.append(
            "Times decide, though the two sides were not interleaved: the machine may have changed between."
        )
    return [*hints, ""] if hints else []


def _unlearned(current: Side, baseline: Side) -> int:
    """How many trials have learned nothing on both sides."""
    before = {(trial.key, trial.replicate): trial.metrics.get("accuracy", 1.0) for trial in baseline.trials}
    count = 0
    for trial in current.trials:
        floors = [trial.metrics[name] for name in FLOORS if name in trial.metrics]
        if trial.quality == "accuracy" and floors:
            best = max(trial.metrics.get("accuracy", 1.0), before.get((trial.key, trial.replicate), 1.0))
            count += best <= max(floors) + LEARNED
    return count


def _baseline_name(side: Side) -> str:
    name = Path(side.name).stem if side.name.endswith(".json") else side.name
    return plain(name, limit=100)


def _write(path: Path | None, text: str) -> None:
    if path is None:
        return
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "Is a directory")
        store.write_atomically(path, text)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error
