"""Records as JSON: what goes in comes out, and what is no record is refused with a reason."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.record import (
    SCHEMA_VERSION,
    STATUSES,
    Measurement,
    Outcome,
    RecordError,
    Sample,
    TrialRecord,
    from_json,
    measurement_from_json,
    to_json,
)

finite = st.floats(allow_nan=False)
samples = st.builds(
    Sample,
    metric=st.text(min_size=1),
    unit=st.sampled_from(["s", "bytes"]),
    values=st.lists(finite, max_size=4).map(tuple),
    phase=st.none() | st.sampled_from(["forward", "backward"]),
    at=st.dictionaries(st.text(), st.integers() | st.text(), max_size=2),
)
outcomes = st.builds(
    Outcome,
    status=st.sampled_from(STATUSES),
    message=st.text(),
    traceback=st.text(),
    stderr=st.lists(st.text(), max_size=3).map(tuple),
    signal=st.none() | st.integers(1, 64),
    rss_bytes_at_death=st.none() | st.integers(0),
    checksum=st.text(),
)
records = st.builds(
    TrialRecord,
    trial_id=st.text("0123456789abcdef", min_size=12, max_size=12),
    experiment=st.text(),
    cell=st.dictionaries(st.text(), st.text(), max_size=3),
    code=st.text(),
    spec=st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.booleans(), max_size=3),
    outcome=outcomes,
    samples=st.lists(samples, max_size=3).map(tuple),
    series=st.dictionaries(
        st.text(), st.dictionaries(st.text(), st.lists(finite, max_size=3), max_size=2), max_size=2
    ),
    theory=st.dictionaries(st.text(), st.none() | st.text(), max_size=2),
    started_at=st.text(),
    duration_s=finite,
)


@given(records)
def test_a_record_survives_json(record: TrialRecord) -> None:
    again = from_json(to_json(record))
    if all(map(math.isfinite, [record.duration_s])):
        assert again == record


@given(st.lists(samples, max_size=3).map(tuple), outcomes)
def test_a_measurement_survives_json(taken: tuple[Sample, ...], outcome: Outcome) -> None:
    measurement = Measurement(outcome=outcome, samples=taken)
    assert measurement_from_json(to_json(measurement)) == measurement


def plain(**changes: object) -> str:
    record = TrialRecord(
        trial_id="a" * 12, experiment="x", cell={}, code="c", spec={}, outcome=Outcome(status="ok")
    )
    return json.dumps({**json.loads(to_json(record)), **changes})


def test_numbers_that_are_none_are_still_standard_json() -> None:
    sample = Sample(metric="loss", unit="nats", values=(math.nan, math.inf, -math.inf))
    text = to_json(Measurement(outcome=Outcome(status="diverged"), samples=(sample,)))
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    values = measurement_from_json(text).samples[0].values
    assert math.isnan(values[0])
    assert values[1:] == (math.inf, -math.inf)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no schema_version or trial_id"),
        (plain(schema_version=SCHEMA_VERSION + 1), "newer than this harness knows"),
        (plain(schema_version="1"), "no schema_version"),
        (plain(outcome={"status": "sad"}), "none of ok, out_of_memory"),
        (plain(outcome=None), "not a trial record of schema"),
        (plain(surprise=1), "surprise"),
        (plain(samples=[{"metric": "x", "unit": "s", "values": ["much"]}]), "much"),
    ],
)
def test_what_is_no_record_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        from_json(text)


def test_a_worker_that_wrote_something_else_is_refused() -> None:
    with pytest.raises(RecordError, match="not a measurement"):
        measurement_from_json("{}")


def test_values_are_found_by_metric_phase_and_setting() -> None:
    record = TrialRecord(
        trial_id="a",
        experiment="x",
        cell={},
        code="c",
        spec={},
        outcome=Outcome(status="ok"),
        samples=(
            Sample(metric="m", unit="s", values=(1.0,)),
            Sample(metric="m", unit="s", values=(2.0,), phase="forward"),
            Sample(metric="m", unit="s", values=(3.0,), at={"n_hashes": 8}),
        ),
    )
    assert record.values("m") == (1.0,)
    assert record.values("m", phase="forward") == (2.0,)
    assert record.values("m", at={"n_hashes": 8}) == (3.0,)
    assert record.values("other") == ()


@given(records)
def test_a_record_as_trained_is_the_record_without_its_curves_and_other_settings(record: TrialRecord) -> None:
    found = from_json(to_json(record), as_trained=True)
    if math.isfinite(record.duration_s):
        kept = tuple(sample for sample in record.samples if not sample.at)
        assert found == replace(record, samples=kept, series={})


def test_a_record_of_another_layout_is_read_as_trained_too() -> None:
    text = json.dumps(json.loads(plain(series={"train": {"loss": [1.0]}})), sort_keys=True)
    assert from_json(text, as_trained=True) == replace(from_json(text), series={})


@pytest.mark.parametrize("cut", [1, 40, 400])
def test_a_torn_record_is_refused_as_trained_too(cut: int) -> None:
    with pytest.raises(RecordError):
        from_json(to_json(from_json(plain()))[:-cut], as_trained=True)


@pytest.mark.parametrize("samples", [[3], ["x"], 3])
def test_samples_that_are_none_are_refused_as_trained_too(samples: object) -> None:
    with pytest.raises(RecordError, match="not a trial record"):
        from_json(plain(samples=samples), as_trained=True)
