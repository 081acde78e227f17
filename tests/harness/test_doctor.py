"""The doctor believes good instruments, and finds each one that lies."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import doctor
from harness.doctor import Check, examine
from harness.record import Measurement, Sample
from harness.server import ForkServer
from tests.harness.conftest import Shell
from tests.harness.specs import plain_spec

SELF_TEST = {
    "_target_": "harness.workloads.self_test.SelfTest",
    "mebibytes": 64,
    "sleep_s": 0.02,
    "pairs": 3,
}


@pytest.fixture(scope="module")
def measured() -> Measurement:
    """What the workload really measures here."""
    with ForkServer() as server:
        (decoded,) = server.decode([plain_spec(workload=SELF_TEST)], check_device=False)
        assert decoded.spec is not None, decoded.error
        return doctor._run(server, decoded.spec).measurement


@pytest.fixture
def found(
    measured: Measurement, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[Measurement], Measurement]], dict[str, Check]]:
    """The findings on six trials like the measured one, after a lie was planted in each."""

    def find(plant: Callable[[Measurement], Measurement]) -> dict[str, Check]:
        count = iter(range(100))

        def run(server: ForkServer, spec: Mapping[str, Any]) -> doctor._Run:
            number = next(count)
            theory = {**measured.theory, "process": float(number)}
            turns = tuple(0.01 * (1 + 0.01 * (index * 7 % 5) + 0.002 * number) for index in range(6))
            honest = with_values(dataclasses.replace(measured, theory=theory), "turn_s", *turns)
            (own,) = doctor._values(honest, "trial_s")
            return doctor._Run(measurement=plant(honest), seconds=own + 0.02)

        monkeypatch.setattr(doctor, "_run", run)
        # One measuring process decodes for all the tests.
        monkeypatch.setattr(ForkServer, "close", lambda self: None)
        checks = examine(plain_spec(workload=SELF_TEST), results_dir=tmp_path)
        return {check.name: check for check in checks}

    return find


def with_values(measurement: Measurement, metric: str, *values: float) -> Measurement:
    samples = tuple(
        dataclasses.replace(sample, values=values) if sample.metric == metric else sample
        for sample in measurement.samples
    )
    assert any(sample.metric == metric for sample in samples)
    return dataclasses.replace(measurement, samples=samples)


def test_the_instruments_of_this_machine_tell_the_truth(
    found: Callable[[Callable[[Measurement], Measurement]], dict[str, Check]],
) -> None:
    checks = found(lambda measurement: measurement)
    assert {check.verdict for check in checks.values()} <= {"ok", "note"}, checks
    for name in ("peak_alloc_bytes", "saved_bytes", "peak_rss_delta_bytes", "clock", "operations", "threads"):
        assert checks[name].verdict == "ok"
    assert "smallest difference that can be found: " in checks["A/A in turns"].detail
    assert checks["corpus pycode"].verdict == "ok"


@pytest.mark.parametrize(
    ("name", "lie"),
    [
        ("peak_alloc_bytes", lambda m: with_values(m, "peak_alloc_bytes", 1.03 * 64 * 2**20)),
        ("saved_bytes", lambda m: with_values(m, "saved_bytes", 31 * 2**20)),
        ("peak_rss_delta_bytes", lambda m: with_values(m, "peak_rss_delta_bytes", 100 * 2**20)),
        ("clock", lambda m: with_values(m, "forward_s", 0.0190, 0.03)),
        ("operations", lambda m: with_values(m, "flops", 1.0)),
        ("threads", lambda m: dataclasses.replace(m, theory={**m.theory, "threads": 7.0})),
        ("isolation", lambda m: dataclasses.replace(m, theory={**m.theory, "process": 1.0})),
        ("isolation", lambda m: with_values(m, "trial_s", -1.0)),
    ],
)
def test_each_lie_is_found(
    name: str,
    lie: Callable[[Measurement], Measurement],
    found: Callable[[Callable[[Measurement], Measurement]], dict[str, Check]],
) -> None:
    checks = found(lie)
    assert [check.name for check in checks.values() if check.verdict == "lies"] == [name]


def test_the_smallest_difference_is_that_of_a_normal_test() -> None:
    # Two-sided 5 %, power 80 %: (1.96 + 0.842) sd / sqrt(n).
    assert "7.3% with 16" in doctor._smallest(0.1)
    assert doctor._smallest(0.1).startswith("a pair differs by 10.0% (sd)")


def test_others_and_missing_things_are_notes(
    found: Callable[[Callable[[Measurement], Measurement]], dict[str, Check]],
) -> None:
    def plant(measurement: Measurement) -> Measurement:
        kept = tuple(sample for sample in measurement.samples if sample.metric != "others_cpu")
        theory = {**measurement.theory, "native": "no compiler", "corpus pycode": "! pip install sympy"}
        others = Sample(metric="others_cpu", unit="ratio", values=(0.4,))
        return dataclasses.replace(measurement, samples=(*kept, others), theory=theory)

    checks = found(plant)
    assert checks["others"].verdict == "note"
    assert "40.0%" in checks["others"].detail
    assert checks["compiled kernel"].detail == "no compiler"
    assert (checks["corpus pycode"].verdict, checks["corpus pycode"].detail) == ("note", "pip install sympy")
    assert "lies" not in {check.verdict for check in checks.values()}


def test_a_lie_is_an_exit_code(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check(name="clock", verdict="lies", detail="late"), Check(name="x", verdict="ok", detail="")]
    monkeypatch.setattr(doctor, "examine", lambda config, results_dir: iter(checks))
    result = shell("doctor")
    assert result.code == 1
    assert result.out.splitlines()[-1] == "clock: not to be trusted here"
    assert json.loads(shell("doctor", "--json").out)[0]["verdict"] == "lies"
    checks.pop(0)
    assert (shell("doctor").code, shell("doctor").out.splitlines()[-1]) == (
        0,
        "the instruments tell the truth",
    )


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ("workload.mebibytes=0", "workload.mebibytes=0: must be at least 2"),
        ("nonsense=1", "unknown key 'nonsense'"),
        ("threads=1,2", "threads=1,2 holds several values"),
    ],
)
def test_one_line_for_what_cannot_be(word: str, complaint: str, shell: Shell) -> None:
    result = shell("doctor", word)
    assert result.code != 0
    assert complaint in result.complaint
