"""Studies of a thousand trials: what a command reads and writes of them, not how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from harness import report
from harness.environment import code_fingerprint
from harness.gates.baseline import side_of_study
from harness.plan import look_up
from harness.record import TrialRecord, to_json
from harness.report import sections
from harness.store import Study
from tests.harness import factory
from tests.harness.conftest import Shell

LEVELS = {
    "attention.n_hashes": ["1", "2", "4", "8"],
    "attention.n_buckets": ["4", "16"],
    "model.residual": ["plain", "reversible"],
    "seed": [str(seed) for seed in range(63)],
}
TYPED = ("study=mine", *(f"{key}={','.join(levels)}" for key, levels in LEVELS.items()))


def never(*_: object, **__: object) -> None:
    pytest.fail("a whole record was read")


@pytest.mark.slow
def test_a_thousand_trials_that_are_done_are_planned_without_reading_their_records(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shell.fake("plan", "-m", *TYPED, "--specs", "specs.jsonl").code == 0
    planned = pd.read_json(shell.folder / "specs.jsonl", lines=True)
    study = shell.study("mine")
    study.create()
    for trial_id, cell, spec in zip(planned["trial_id"], planned["cell"], planned["spec"], strict=True):
        record = replace(
            factory.record({"seed": cell["seed"]}),
            trial_id=trial_id,
            cell=cell,
            spec=spec,
            code=code_fingerprint(),
        )
        study.record_path(trial_id).write_text(to_json(record))
    found = [look_up(study, trial_id, code=code_fingerprint()) for trial_id in planned["trial_id"]]
    assert {one.state for one in found} == {"done"}
    with monkeypatch.context() as patched:
        patched.setattr(Study, "read", never)
        assert [
            look_up(study, trial_id, code=code_fingerprint()) for trial_id in planned["trial_id"]
        ] == found
        assert shell("list").code == 0
    assert f"{len(found)} trials ({len(found)} done), 0 to run" in shell.fake("plan", "-m", *TYPED).out
    torn = study.record_path(planned["trial_id"][5])
    torn.write_text(torn.read_text()[:-1000])
    out = shell.fake("plan", "-m", *TYPED).out
    assert f"({len(found) - 1} done, 1 new), 1 to run" in out
    assert "its record cannot be read" in out


@pytest.fixture(scope="module")
def records() -> Sequence[TrialRecord]:
    return factory.sweep(LEVELS)


@pytest.mark.slow
def test_the_report_of_a_thousand_trials_can_be_opened(
    records: Sequence[TrialRecord], tmp_path: Path
) -> None:
    folder = factory.store(tmp_path / "mine", records, factors=LEVELS)
    torn = folder / "trials" / f"{records[0].trial_id}.json"
    torn.write_text(torn.read_text()[:-1000])
    page = report.build(folder)
    assert page.stat().st_size < 6e6
    text = page.read_text()
    assert f"All {len(records) - 1} trials; trials.csv has every column" in text
    assert "1 file among the records could not be read." in text
    samples = pd.read_parquet(page.parent / "samples.parquet")
    assert samples["trial_id"].nunique() == len(records) - 1


@pytest.mark.slow
def test_a_gate_finds_the_same_in_a_part_of_each_record(
    records: Sequence[TrialRecord], tmp_path: Path
) -> None:
    whole = Study(factory.store(tmp_path / "whole", records))
    bare = Study(
        factory.store(
            tmp_path / "bare",
            [
                replace(record, series={}, samples=tuple(each for each in record.samples if not each.at))
                for record in records
            ],
        )
    )
    assert side_of_study(whole).trials == side_of_study(bare).trials


def test_a_page_leaves_out_what_it_could_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "_MAX_TRIALS", 5)
    monkeypatch.setattr(sections, "_MAX_FAILURES", 2)
    done = factory.sweep({"seed": [str(seed) for seed in range(8)]})
    failed = [factory.failed(record, message="too large") for record in done[4:]]
    folder = factory.store(tmp_path / "mine", [*done[:4], *failed])
    for name in ("x", "y", "z"):
        (folder / "trials" / f"{name}.json").write_text("{")
    page = report.build(folder)
    text = (page.parent / "report.md").read_text()
    assert "The first 5 of 8 trials; trials.csv has them all, with every column" in text
    assert text.count("too large") == text.count("not a record:") == 2
    assert "And 3 more: trials.csv has every outcome, trials/ every record." in text
    assert len(pd.read_csv(page.parent / "trials.csv")) == 8
