"""Records that were measured elsewhere, brought into a study: `harness import`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.arguments import parser_for
from harness.environment import code_fingerprint
from harness.errors import EXIT_FAILED, EXIT_OK, UsageError
from harness.protocol import now
from harness.record import RecordError, TrialRecord, from_json, trial_id
from harness.store import Study, study_at
from harness.wording import complain, counted

_STANDARD_INPUT = "-"


def main(argv: Sequence[str]) -> int:
    """`harness import FILE…`."""
    parser = parser_for(
        "import",
        description="Bring in records that were measured elsewhere, by 'python -m harness.worker' or another "
        "checkout. Each is checked: a schema this version does not know, or an id that is not that of its "
        "spec, is refused with the reason, and the others come in.",
        examples=(
            "harness plan experiment=quick --specs specs.jsonl       # here",
            'while read -r s; do echo "$s" | python -m harness.worker; done < specs.jsonl >new.json  # there',
            "harness import new.json --study quick                   # here again",
        ),
    )
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="records: one or several JSON objects a file; a folder is all its *.json; - is standard input",
    )
    parser.add_argument("--study", help="where they go (default: the experiment that each was planned in)")
    arguments = parser.parse_args(argv)
    found = [entry for file in arguments.files for entry in read_records(file)]
    refused = [entry for entry in found if isinstance(entry, Refused)]
    records = [entry for entry in found if isinstance(entry, TrialRecord)]
    for study_name, theirs in _by_study(records, arguments.study).items():
        study = study_at(arguments.results_dir, study_name)
        print(_told(study, bring_in(study, theirs)))
    for refusal in refused:
        complain(f"{refusal.place}: refused, {refusal.reason}")
    if not found:
        raise UsageError(f"no records in {', '.join(arguments.files)}")
    return EXIT_FAILED if refused else EXIT_OK


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Something in a file that is no record of ours, and why."""

    place: str
    reason: str


@dataclass(kw_only=True)
class Imported:
    """What became of records: ids of those that are in the study now, and of those that were not needed."""

    added: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    older: list[str] = field(default_factory=list)
    stale: int = 0


def read_records(file: str) -> Iterator[TrialRecord | Refused]:
    """The records of a file, of a folder's `*.json`, or of standard input for `-`.

    Raises:
        UsageError: it cannot be read.
    """
    if file != _STANDARD_INPUT and Path(file).is_dir():
        for path in sorted(Path(file).glob("*.json")):
            yield from read_records(str(path))
        return
    try:
        if file == _STANDARD_INPUT:
            text = sys.stdin.read()
        else:
            text = Path(file).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    for line, entry in _objects(text):
        place = f"{file}:{line}"
        yield Refused(place=place, reason=entry) if isinstance(entry, str) else _checked(entry, place)


def bring_in(study: Study, records: Sequence[TrialRecord]) -> Imported:
    """Store records in a study; of two of one trial the one that was measured later stays.

    Raises:
        UsageError: the study cannot be written.
    """
    study.create()
    done, code = Imported(), code_fingerprint()
    for record in records:
        done.stale += record.code != code
        try:
            known = study.read(record.trial_id)
        except RecordError:
            known = None
        if known == record:
            done.known.append(record.trial_id)
        elif known is not None and known.started_at > record.started_at:
            done.older.append(record.trial_id)
        else:
            (done.added if known is None else done.replaced).append(record.trial_id)
            study.write(record)
    study.write_info(_with_levels(study.read_info(), study.name, records))
    return done


def _checked(data: Mapping[str, Any], place: str) -> TrialRecord | Refused:
    try:
        record = from_json(json.dumps(data))
    except RecordError as error:
        return Refused(place=place, reason=str(error))
    expected = trial_id(record.spec)
    if record.trial_id != expected:
        reason = f"its id is {record.trial_id}, and its spec is trial {expected}: one of them was changed"
        return Refused(place=place, reason=reason)
    return record


def _objects(text: str) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The JSON objects that follow each other in a text, with their lines; a string says what is wrong."""
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        line = text.count("\n", 0, at) + 1
        try:
            value, end = decoder.raw_decode(text, at)
        except ValueError as error:
            yield line, f"not JSON ({error})"
            return
        for entry in value if isinstance(value, list) else [value]:
            yield line, entry if isinstance(entry, dict) else "not a JSON object"
        at = end


def _by_study(records: Sequence[TrialRecord], study: str | None) -> dict[str, list[TrialRecord]]:
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        groups.setdefault(study or record.experiment, []).append(record)
    return groups


def _with_levels(info: Mapping[str, Any], name: str, records: Sequence[TrialRecord]) -> dict[str, Any]:
    """What `study.json` says once these records belong to the study."""
    levels = {key: list(known) for key, known in info.get("factors", {}).items()}
    for record in records:
        for key, level in record.cell.items():
            known = levels.setdefault(key, [])
            if str(level) not in known:
                known.append(str(level))
    experiments = Counter(record.experiment for record in records)
    return {
        "name": name,
        "experiment": experiments.most_common(1)[0][0],
        "command": "",
        "created": now(),
        **info,
        "factors": levels,
    }


def _told(study: Study, done: Imported) -> str:
    parts = [
        f"{len(ids)} {words}"
        for ids, words in (
            (done.added, "added"),
            (done.replaced, "newer than what was there (that is in trials/superseded)"),
            (done.known, "known already"),
            (done.older, "older than what is there, left out"),
        )
        if ids
    ]
    if done.stale:
        parts.append(f"{counted(done.stale, 'record')} measured with other code than this checkout's")
    return f"study {study.name}: {', '.join(parts)}; 'harness report {study.name}' builds its report"
