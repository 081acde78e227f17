"""Records and specs of before are read for ever, as what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import record as record_module
from harness.codec import decode, encode
from harness.metrics import columns
from harness.record import (
    SCHEMA_VERSION,
    RecordError,
    Summary,
    from_json,
    summary_from_ends,
    to_json,
    trial_id,
)

GOLDEN = Path(__file__).parent / "golden"


def text(version: int = 1) -> str:
    return (GOLDEN / f"record_schema_{version}.json").read_text(encoding="utf-8")


def test_there_is_a_record_of_every_schema() -> None:
    names = {path.name for path in GOLDEN.glob("record_schema_*.json")}
    assert names == {f"record_schema_{version}.json" for version in range(1, SCHEMA_VERSION + 1)}


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION + 1))
def test_a_record_of_any_schema_is_read_with_its_numbers(version: int) -> None:
    record = from_json(text(version))
    assert record.schema_version == SCHEMA_VERSION
    assert (record.trial_id, record.outcome.status) == ("4099cfa79490", "ok")
    found = columns(record)
    assert found["accuracy"] == pytest.approx(0.99963, abs=1e-4)
    assert found["peak_alloc_bytes"] == 8_376_056
    assert found["accuracy@attention=knock_out"] < 0.1


def test_a_record_of_this_schema_is_written_as_it_was() -> None:
    assert to_json(from_json(text(SCHEMA_VERSION))) + "\n" == text(SCHEMA_VERSION)
    assert summary_from_ends(text(), text()) == Summary.of(from_json(text()))


def test_a_spec_of_before_is_the_same_trial_today() -> None:
    """New keys leave it at what it meant: its id, by which studies find their records, does not change."""
    spec = json.loads(text())["spec"]
    assert trial_id(spec) == "4099cfa79490"
    assert encode(decode(spec)) == spec


def test_older_schemas_are_upgraded_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_two(data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "experiment": f"{data['experiment']}, upgraded"}

    def to_three(data: dict[str, Any]) -> dict[str, Any]:
        return {**data, "experiment": f"{data['experiment']} twice"}

    monkeypatch.setattr(record_module, "SCHEMA_VERSION", 3)
    monkeypatch.setattr(record_module, "UPGRADES", {1: to_two, 2: to_three})
    assert from_json(text(1)).experiment == "quick, upgraded twice"
    assert from_json(text(1)).schema_version == 3
    monkeypatch.setattr(record_module, "UPGRADES", {2: to_three})
    with pytest.raises(RecordError, match="schema 1 is older than this harness reads"):
        from_json(text(1))
