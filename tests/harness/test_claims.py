"""Who runs a trial, and when that counts no more."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from harness import claims
from harness.claims import Claim, claim_path, claimed, read_claim
from harness.store import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    study = Study(tmp_path / "results" / "mine")
    study.create()
    return study


def mine(*, age_s: float = 0.0, **changes: Any) -> Claim:
    claim = Claim(
        host=platform.node(),
        pid=os.getpid(),
        boot=claims._boot_id(),
        started_at=time.time() - age_s,
        timeout_s=100.0,
    )
    return replace(claim, **changes)


def put(study: Study, claim: Claim) -> Path:
    path = claim_path(study, "aaaa")
    path.write_text(json.dumps(asdict(claim)))
    return path


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_says_who_and_goes_away(study: Study) -> None:
    with claimed(study, "aaaa", timeout_s=5.0) as ours:
        assert ours
        claim = read_claim(claim_path(study, "aaaa"))
        assert claim is not None
        assert claim.alive
        assert (claim.pid, claim.host, claim.timeout_s) == (os.getpid(), platform.node(), 5.0)
        with claimed(study, "aaaa", timeout_s=5.0) as theirs:
            assert not theirs
        assert claim_path(study, "aaaa").exists()
    assert not claim_path(study, "aaaa").exists()


@pytest.mark.parametrize(
    ("changes", "alive"),
    [
        ({}, True),
        ({"age_s": 1e9}, False),  # this number belongs to a younger process now
        ({"boot": "another"}, False),
        ({"host": "elsewhere"}, True),
        ({"host": "elsewhere", "boot": "another", "pid": 1}, True),
        ({"host": "elsewhere", "age_s": 150}, True),
        ({"host": "elsewhere", "age_s": 170}, False),
        ({"host": "elsewhere", "age_s": 3600, "timeout_s": None}, True),
        ({"host": "elsewhere", "age_s": 90_000, "timeout_s": None}, False),
    ],
)
def test_when_a_claim_is_dead(changes: Mapping[str, Any], alive: bool, study: Study) -> None:
    assert mine(**changes).alive == alive
    put(study, mine(**changes))
    with claimed(study, "aaaa", timeout_s=None) as ours:
        assert ours != alive


def test_a_claim_of_a_process_that_is_gone_is_taken_over(study: Study, dead_pid: int) -> None:
    path = put(study, mine(pid=dead_pid))
    with claimed(study, "aaaa", timeout_s=None) as ours:
        assert ours
        holder = read_claim(path)
        assert holder is not None
        assert holder.pid == os.getpid()
    assert not path.exists()


def test_a_claim_that_is_just_being_written_counts_and_an_old_torn_one_does_not(study: Study) -> None:
    path = claim_path(study, "aaaa")
    path.write_text("")
    with claimed(study, "aaaa", timeout_s=None) as ours:
        assert not ours
    os.utime(path, (0, 0))
    with claimed(study, "aaaa", timeout_s=None) as ours:
        assert ours


def test_only_one_of_many_gets_a_claim(study: Study, dead_pid: int) -> None:
    put(study, mine(pid=dead_pid))
    start, results = threading.Barrier(8), []

    def race() -> None:
        start.wait()
        with claimed(study, "aaaa", timeout_s=None) as ours:
            results.append(ours)
            time.sleep(0.3)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.count(True) == 1


def test_only_dead_claims_are_dropped(study: Study, dead_pid: int) -> None:
    put(study, mine(pid=dead_pid))
    alive = claim_path(study, "bbbb")
    alive.write_text(json.dumps(asdict(mine())))
    claims.drop_dead(study)
    assert [path.name for path in study.trials.glob("*.claim")] == [alive.name]
