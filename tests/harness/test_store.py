"""Studies on disk."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.record import Outcome, RecordError, Summary, TrialRecord, to_json
from harness.store import Study, open_study, studies, study_at, write_atomically
from tests.harness import factory


def record(trial_id: str, *, code: str = "code", at: str = "2026-01-01T00:00:00+00:00") -> TrialRecord:
    return TrialRecord(
        trial_id=trial_id,
        experiment="x",
        cell={},
        code=code,
        spec={},
        outcome=Outcome(status="ok"),
        started_at=at,
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "results" / "mine")
    study.create()
    return study


def test_what_is_written_is_read(study: Study) -> None:
    assert study.read("a") is None
    study.write(record("a"))
    assert study.read("a") == record("a")


def test_scan_is_by_age_and_names_what_is_no_record(study: Study) -> None:
    study.write(record("a", at="2026-01-02"))
    study.write(record("b", at="2026-01-01"))
    study.record_path("c").write_text("{")
    study.record_path("d").write_bytes(b"\xff\xfe")
    (study.trials / ".hidden.json").write_text("{")
    (study.trials / "a.claim").write_text("{")
    records, unreadable = study.scan()
    assert [entry.trial_id for entry in records] == ["b", "a"]
    assert [entry.path.stem for entry in unreadable] == ["c", "d"]
    assert "not JSON" in unreadable[0].reason


def test_a_record_under_another_name_is_refused(study: Study) -> None:
    study.write(record("a"))
    study.record_path("a").rename(study.record_path("b"))
    with pytest.raises(RecordError, match="holds trial a, not b"):
        study.read("b")


def test_a_replaced_record_is_kept_aside(study: Study) -> None:
    study.write(record("a", code="old"))
    study.write(record("a", code="new"))
    study.record_path("a").write_text("{")
    study.write(record("a"))
    study.record_path("a").write_text("{{")
    study.write(record("a"))
    names = sorted(path.name for path in (study.trials / "superseded").iterdir())
    assert names[0] == "a.old.20260101T0000000000.json"
    assert len([name for name in names if name.startswith("a.unreadable.")]) == len(names) - 1 == 2
    assert len(study.scan()[0]) == 1


def test_many_writers_never_show_half_a_record(study: Study) -> None:
    stop, torn = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                study.read("a")
            except RecordError as error:
                torn.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    writers = [
        threading.Thread(target=write_atomically, args=(study.path / "x" / str(n % 2), "x" * 100_000))
        for n in range(8)
    ]
    for writer in writers:
        writer.start()
    for _ in range(30):
        study.write(record("a"))
    for writer in writers:
        writer.join()
    stop.set()
    reader.join()
    assert torn == []
    assert {path.name for path in (study.path / "x").iterdir()} == {"0", "1"}


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "x", 3)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_atomically(tmp_path / "x", "text")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_study_info_survives_being_torn(study: Study) -> None:
    assert study.read_info() == {}
    study.write_info({"name": "mine"})
    assert study.read_info() == {"name": "mine"}
    for text in ("{", "[1]"):
        (study.path / "study.json").write_text(text)
        assert study.read_info() == {}


@pytest.mark.parametrize(
    "name", ["", "a/b", "..", ".hidden", "-x", "a" * 101, "baselines", "reference", "a b"]
)
def test_names_that_are_no_study(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no study name"):
        study_at(tmp_path, name)


def test_opening_by_name_and_by_path(study: Study) -> None:
    results = study.path.parent
    assert open_study(results, "mine") == study
    assert open_study(Path("elsewhere"), str(study.path)) == study
    with pytest.raises(UsageError, match="did you mean 'mine'"):
        open_study(results, "mime")
    with pytest.raises(UsageError, match="no studies yet"):
        open_study(results.parent / "nowhere", "mine")


def test_list_of_studies_leaves_published_files_out(study: Study) -> None:
    results = study.path.parent
    (results / "reference" / "trials").mkdir(parents=True)
    (results / "notes").mkdir()
    assert studies(results) == [study]
    assert studies(results / "nowhere") == []


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot write to .*results_dir=PATH"):
        Study(tmp_path / "file" / "mine").create()


@pytest.mark.parametrize(
    "info", [[], 3, {"factors": 3, "overrides": "x"}, {"factors": {"a": 1}, "overrides": {"b": None}}]
)
def test_a_foreign_study_file_says_nothing(study: Study, info: object) -> None:
    study.create()
    (study.path / "study.json").write_text(json.dumps(info))
    found = study.read_info()
    assert not any(found.get(key) for key in ("factors", "overrides"))


HOSTILE = '\n "environment": {}\n "started_at": "x" }, "schema_version": 9'


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(status="ok"),
        Outcome(status="error", message=HOSTILE, traceback=HOSTILE, stderr=(HOSTILE,)),
        Outcome(status="killed", message="x" * 40_000),
        Outcome(status="invalid", message="é" * 9000),
    ],
    ids=["good", "hostile", "longer than what is read first", "cut within a letter"],
)
def test_a_summary_is_that_of_the_whole_record(outcome: Outcome, study: Study) -> None:
    written = replace(factory.record({"seed": 0}), outcome=outcome, cell={"task": HOSTILE})
    study.write(written)
    assert study.summary(written.trial_id) == Summary.of(written)
    assert study.summaries() == ([Summary.of(written)], [])


def test_a_summary_reads_the_whole_file_only_if_it_must(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = factory.record({"seed": 0})
    study.write(written)
    monkeypatch.setattr(Study, "read", lambda self, trial_id: pytest.fail("read it all"))
    assert study.summary(written.trial_id) == Summary.of(written)


@pytest.mark.parametrize("cut", [1, 40, 3000])
def test_a_summary_of_a_torn_or_foreign_file_is_refused(cut: int, study: Study) -> None:
    written = factory.record({"seed": 0})
    path = study.record_path(written.trial_id)
    study.create()
    path.write_text(to_json(written)[:-cut])
    with pytest.raises(RecordError):
        study.summary(written.trial_id)
    path.write_text(to_json(replace(written, trial_id="other")))
    with pytest.raises(RecordError, match="holds trial other"):
        study.summary(written.trial_id)
    path.write_text(json.dumps({**json.loads(to_json(written)), "schema_version": 99}, indent=1))
    with pytest.raises(RecordError, match="schema 99 is newer"):
        study.summary(written.trial_id)
    assert study.summary("nothing") is None


def test_a_record_of_another_layout_has_a_summary_too(study: Study) -> None:
    written = factory.record({"seed": 0})
    study.create()
    study.record_path(written.trial_id).write_text(json.dumps(json.loads(to_json(written)), sort_keys=True))
    assert study.summary(written.trial_id) == Summary.of(written)


def test_what_was_half_written_long_ago_is_removed(study: Study) -> None:
    old, fresh = study.trials / ".a.json.0f.tmp", study.path / ".study.json.0e.tmp"
    for path in (old, fresh):
        path.write_text("{")
    os.utime(old, (0, 0))
    study.drop_torn()
    assert (old.exists(), fresh.exists()) == (False, True)
