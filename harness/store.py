"""Studies on disk: records written once, atomically, safe for many writers on a shared file system.

results/<study>/study.json               name, command, swept factors and levels, created, versions
results/<study>/trials/<trial_id>.json   one record
results/<study>/trials/superseded/       records that a rerun replaced
results/<study>/logs/<trial_id>.log      what the trial printed
results/<study>/weights/                trained weights, where train.save_weights=true asked for them
results/<study>/report/                  made from the records, can be deleted at any time
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import os
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from harness.errors import UsageError
from harness.record import RecordError, Summary, TrialRecord, from_json, summary_from_ends, to_json

_STUDY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")
#: Folders under `results/` that hold published files, not studies of this checkout.
RESERVED_NAMES = ("baselines", "reference")


#: Bytes at both ends of a record that tell what it is about, unless it ended with a long message.
_HEAD, _TAIL = 16_384, 512
#: Nobody takes that long to write a file.
_ABANDONED_S = 3600.0


#: A record, or its summary.
_Found = TypeVar("_Found", TrialRecord, Summary)


@dataclass(frozen=True)
class Unreadable:
    """A file among the records that is not one, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Study:
    """A folder of trial records. Creating the object touches nothing."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def record_path(self, trial_id: str) -> Path:
        return self.trials / f"{trial_id}.json"

    def log_path(self, trial_id: str) -> Path:
        return self.path / "logs" / f"{trial_id}.log"

    def weights_path(self, trial_id: str) -> Path:
        return self.path / "weights" / f"{trial_id}.safetensors"

    def create(self) -> None:
        """Make the folders.

        Raises:
            UsageError: they cannot be made or written here.
        """
        try:
            for folder in (self.trials, self.path / "logs"):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.trials):
                pass
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path}: {error.strerror}; give another place with results_dir=PATH"
            ) from error

    def read(self, trial_id: str, *, as_trained: bool = False) -> TrialRecord | None:
        """The record of one trial, None if there is none.

        Args:
            as_trained: leave out curves, and what was measured under other settings than the trained ones.

        Raises:
            RecordError: the file is torn or foreign.
        """
        try:
            text = self.record_path(trial_id).read_bytes().decode("utf-8")
        except FileNotFoundError:
            return None
        except (UnicodeDecodeError, OSError) as error:
            raise RecordError(str(error)) from error
        record = from_json(text, as_trained=as_trained)
        if record.trial_id != trial_id:
            raise RecordError(f"holds trial {record.trial_id}, not {trial_id}")
        return record

    def summary(self, trial_id: str) -> Summary | None:
        """What the record of a trial is about and how it ended, None if there is none.

        Raises:
            RecordError: the file is torn or foreign.
        """
        try:
            with self.record_path(trial_id).open("rb") as stream:
                head = stream.read(_HEAD)
                stream.seek(-min(_TAIL, os.fstat(stream.fileno()).st_size), os.SEEK_END)
                tail = stream.read()
            found = summary_from_ends(head.decode("utf-8", "ignore"), tail.decode("utf-8", "ignore"))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RecordError(str(error)) from error
        if found is None or found.trial_id != trial_id:
            record = self.read(trial_id)
            return None if record is None else Summary.of(record)
        return found

    def summaries(self) -> tuple[list[Summary], list[Unreadable]]:
        """Of all records, oldest first, and the files that are none."""
        return _by_age(self._each(self.summary))

    def scan(self) -> tuple[list[TrialRecord], list[Unreadable]]:
        """All records, oldest first, and the files that are none."""
        return _by_age(self.each())

    def each(self, *, as_trained: bool = False) -> Iterator[TrialRecord | Unreadable]:
        """Record after record, by their ids, so that not all of them need be held at once.

        Args:
            as_trained: leave out what most of a record is, as `read` does.
        """
        return self._each(functools.partial(self.read, as_trained=as_trained))

    def write(self, record: TrialRecord) -> None:
        """Store a record; one that is there already is moved to `superseded/` first."""
        path = self.record_path(record.trial_id)
        if path.exists():
            self._supersede(path)
        write_atomically(path, to_json(record) + "\n")

    def read_info(self) -> dict[str, Any]:
        """What `study.json` says, without parts that cannot be read; empty if it is missing or torn."""
        try:
            info = json.loads((self.path / "study.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(info, dict):
            return {}
        return {
            key: lists_by_name(value) if key in ("factors", "overrides") else value
            for key, value in info.items()
        }

    def write_info(self, info: Mapping[str, Any]) -> None:
        write_atomically(self.path / "study.json", json.dumps(info, indent=1) + "\n")

    def drop_torn(self) -> None:
        """Remove what writers left half written that were killed long ago."""
        for folder in (self.path, self.trials):
            for path in folder.glob(".*.tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _ABANDONED_S:
                        path.unlink()

    def _each(self, read: Callable[[str], _Found | None]) -> Iterator[_Found | Unreadable]:
        """What is read of each trial by its id."""
        for path in self._record_files():
            try:
                found = read(path.stem)
            except RecordError as error:
                yield Unreadable(path, str(error))
            else:
                if found is not None:
                    yield found

    def _record_files(self) -> Iterator[Path]:
        if self.trials.is_dir():
            yield from sorted(path for path in self.trials.glob("*.json") if not path.name.startswith("."))

    def _supersede(self, path: Path) -> None:
        try:
            old = from_json(path.read_text(encoding="utf-8"))
            name = f"{path.stem}.{old.code}.{re.sub(r'[^0-9A-Za-z]', '', old.started_at)}.json"
        except (RecordError, UnicodeDecodeError):
            name = f"{path.stem}.unreadable.{secrets.token_hex(4)}.json"
        folder = self.trials / "superseded"
        folder.mkdir(exist_ok=True)
        os.replace(path, folder / name)


def _by_age(entries: Iterable[_Found | Unreadable]) -> tuple[list[_Found], list[Unreadable]]:
    """What could be read, oldest first, and what could not."""
    found: list[_Found] = []
    unreadable = []
    for entry in entries:
        if isinstance(entry, Unreadable):
            unreadable.append(entry)
        else:
            found.append(entry)
    return sorted(found, key=lambda entry: (entry.started_at, entry.trial_id)), unreadable


def lists_by_name(value: object) -> dict[str, list[str]]:
    """Levels by key, or words by trial, without what is neither."""
    if not isinstance(value, Mapping):
        return {}
    return {
        str(name): [str(entry) for entry in entries]
        for name, entries in value.items()
        if isinstance(entries, (list, tuple))
    }


def study_at(results_dir: Path, name: str) -> Study:
    """The study of that name, which need not exist yet.

    Raises:
        UsageError: a name that is no plain folder name.
    """
    if not _STUDY_NAME.fullmatch(name) or name in RESERVED_NAMES:
        raise UsageError(
            f"study={name[:60]!r} is no study name: use at most 100 letters, digits, '.', '_', '+', '-' "
            f"(and none of {', '.join(RESERVED_NAMES)})"
        )
    return Study(results_dir / name)


def open_study(results_dir: Path, name: str) -> Study:
    """The study of that name, or the one in the folder of that path.

    Raises:
        UsageError: there is none; the message names the nearest ones.
    """
    as_path = Path(name)
    if len(as_path.parts) > 1 and (as_path / "trials").is_dir():
        return Study(as_path)
    study = Study(as_path) if len(as_path.parts) > 1 else study_at(results_dir, name)
    if study.trials.is_dir():
        return study
    known = [entry.name for entry in studies(results_dir)]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there: {', '.join(known) or 'no studies yet'}"
    raise UsageError(f"no study {name!r} in {results_dir}; {hint}")


def studies(results_dir: Path) -> list[Study]:
    """Every study under a results folder, by name."""
    if not results_dir.is_dir():
        return []
    folders = (path for path in sorted(results_dir.iterdir()) if path.name not in RESERVED_NAMES)
    return [Study(path) for path in folders if (path / "trials").is_dir()]


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the whole new text, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
