"""Studies on disk."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from harness.errors import UsageError
from harness.record import Outcome, RecordError, TrialRecord
from harness.store import Study, open_study, studies, study_at, write_atomically


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
