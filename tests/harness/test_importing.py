"""Records from elsewhere come in, and what is none of ours does not."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.record import TrialRecord, to_json
from tests.harness.conftest import Shell, harness_environment


@pytest.fixture
def records(shell: Shell) -> list[TrialRecord]:
    """Of a study that another machine has."""
    shell.fake("run", "-m", "seed=0,1", "study=there", "experiment=fake_seeds")
    return shell.records("there")


def put(folder: Path, *texts: str, name: str = "records.json") -> Path:
    path = folder / name
    path.write_text("\n".join(texts))
    return path


def test_records_come_into_the_study_of_their_experiment(shell: Shell, records: list[TrialRecord]) -> None:
    file = put(shell.folder, *map(to_json, records))
    result = shell("import", file)
    assert result.code == 0
    assert result.out.startswith(f"study fake_seeds: {len(records)} added; ")
    assert shell.records("fake_seeds") == records
    info = shell.study("fake_seeds").read_info()
    assert info["factors"]["seed"] == ["0", "1"]
    assert shell("import", file).out.startswith(f"study fake_seeds: {len(records)} known already; ")


def test_what_the_worker_says_on_a_bare_node_comes_in(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.fake("plan", "-m", "seed=0,1", "--specs", "specs.jsonl")
    said = [
        subprocess.run(
            [sys.executable, "-m", "harness.worker"],
            input=line,
            capture_output=True,
            text=True,
            check=True,
            env=harness_environment(),
        ).stdout
        for line in (shell.folder / "specs.jsonl").read_text().splitlines()
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(said)))
    result = shell("import", "-", "--study", "brought")
    assert (result.code, result.out.partition(";")[0]) == (0, "study brought: 2 added")
    assert "2 trials (2 done), 0 to run" in shell.fake("plan", "-m", "seed=0,1", "study=brought").out


def test_what_is_no_record_is_refused_with_the_reason_and_the_rest_comes_in(
    shell: Shell, records: list[TrialRecord]
) -> None:
    good, other = (json.loads(to_json(record)) for record in records[:2])
    newer = {**other, "schema_version": 99}
    foreign = {**other, "trial_id": "000000000000"}
    edited = {**other, "spec": {**other["spec"], "threads": 64}}
    file = put(shell.folder, *(json.dumps(entry) for entry in (newer, foreign, good, edited, [1])), "torn {")
    result = shell("import", file, "--study", "mine")
    assert result.code == 1
    assert [record.trial_id for record in shell.records("mine")] == [good["trial_id"]]
    complaints = result.err.splitlines()
    assert len(complaints) == 5
    assert "records.json:1: refused, schema 99 is newer than this harness knows" in complaints[0]
    assert f"its id is 000000000000, and its spec is trial {other['trial_id']}" in complaints[1]
    assert f"records.json:4: refused, its id is {other['trial_id']}, and its spec is trial" in complaints[2]
    assert "records.json:5: refused, not a JSON object" in complaints[3]
    assert "records.json:6: refused, not JSON" in complaints[4]


def test_of_two_records_of_a_trial_the_younger_one_stays(shell: Shell, records: list[TrialRecord]) -> None:
    record = records[0]
    older = replace(record, started_at="2020-01-01T00:00:00.000+00:00")
    younger = replace(record, started_at="2030-01-01T00:00:00.000+00:00", code="f" * 12)
    folder = shell.folder / "brought"
    folder.mkdir()
    for name, each in (("a", record), ("b", older), ("c", younger)):
        put(folder, to_json(each), name=f"{name}.json")
    result = shell("import", folder, "--study", "mine")
    assert "1 added, 1 newer than what was there" in result.out
    assert "1 older than what is there, left out" in result.out
    assert "1 record measured with other code" in result.out
    assert shell.records("mine") == [younger]
    assert len(list((shell.study("mine").trials / "superseded").iterdir())) == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("nowhere.json",), "cannot read nowhere.json: No such file or directory"),
        (("empty.json",), "no records in empty.json"),
        (("records.json", "--study", "../x"), "study='../x' is no study name"),
    ],
)
def test_one_line_for_what_cannot_be(
    words: tuple[str, ...], complaint: str, shell: Shell, records: list[TrialRecord]
) -> None:
    put(shell.folder, name="empty.json")
    put(shell.folder, to_json(records[0]))
    result = shell("import", *words)
    assert result.code == 2
    assert complaint in result.complaint
