"""A sweep is killed again and again, at any instant: nothing finished is lost or torn, nothing lives on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.record import Outcome
from harness.store import Study
from tests.harness.conftest import FAKE_CONF, harness_environment

KILLS = 60
TRIALS = 200
LONGEST_S = 5.0
#: All in one block, so that one measuring process does them all.
LEVELS = "range(3,{})"
SWEEP = (
    *("run", "-cd", str(FAKE_CONF), "workload=fake", "-m", f"task.n_symbols={LEVELS.format(3 + TRIALS)}"),
    *("workload.seconds=0.03", "threads=1", "study=killed", "retries=0"),
)


def start(folder: Path, *, trials: int = TRIALS) -> subprocess.Popen[bytes]:
    words = [word.replace(LEVELS.format(3 + TRIALS), LEVELS.format(3 + trials)) for word in SWEEP]
    return subprocess.Popen(
        [sys.executable, "-m", "harness", *words],
        cwd=folder,
        env=harness_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def family(pid: int) -> list[psutil.Process]:
    """The sweep, its measuring process, and the trial in it, as far as they are there."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def gone_within(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those that live on."""
    until = time.monotonic() + seconds
    alive = processes
    while alive and time.monotonic() < until:
        alive = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.02)
    return alive


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kills_at_any_instant_lose_nothing_that_was_finished(tmp_path: Path) -> None:
    draw = random.Random(20)
    study = Study(tmp_path / "results" / "killed")
    kept: dict[str, str] = {}
    whom: list[str] = []
    for _ in range(KILLS):
        process = start(tmp_path)
        # The first seconds are planning; later ones fall into trials, records and the report.
        time.sleep(draw.uniform(0, LONGEST_S))
        relatives = family(process.pid)
        target = draw.choice(["parent", "child", "both", "server"])
        victims = {
            "parent": relatives[:1],
            "server": relatives[1:2],
            "child": relatives[2:3],
            "both": relatives[:1] + relatives[2:3],
        }[target]
        for victim in victims:
            try:
                os.kill(victim.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            whom.append(target)
        if target in ("parent", "both"):
            process.wait(30)
            assert gone_within(relatives, 10) == [], "a process of a killed sweep lives on"
        else:
            # One trial or server less: the sweep goes on, and is ended here so that the next kill finds work.
            time.sleep(draw.uniform(0, 0.5))
            process.kill()
            process.wait(30)
            assert gone_within(family(process.pid) or relatives, 10) == []
        records, unreadable = study.scan() if study.trials.is_dir() else ([], [])
        assert unreadable == []
        now = {record.trial_id: record.started_at for record in records}
        finished = {record.trial_id for record in records if record.outcome.status == "ok"}
        for trial_id, started_at in kept.items():
            assert now.get(trial_id) == started_at, "a finished record was lost or measured again"
        kept = {trial_id: started_at for trial_id, started_at in now.items() if trial_id in finished}
    assert len(whom) >= 50, f"only {len(whom)} processes were there to be killed"
    assert {"parent", "child", "both"} <= set(whom)

    last = start(tmp_path)
    assert last.wait(300) in (0, 1)
    records, unreadable = study.scan()
    assert unreadable == []
    assert len(records) == TRIALS
    # Killed trials are records of their own; they run again on demand, and then all is well.
    again = subprocess.run(
        [sys.executable, "-m", "harness", *SWEEP, "rerun=failed"],
        cwd=tmp_path,
        env=harness_environment(),
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert {record.outcome for record in study.scan()[0]} == {Outcome(status="ok")}
    assert not list(study.trials.glob("*.claim"))


@pytest.mark.slow
def test_two_sweeps_into_one_study_share_the_work(tmp_path: Path) -> None:
    sweeps = [start(tmp_path, trials=40) for _ in range(2)]
    codes = {sweep.wait(200) for sweep in sweeps}
    # The one that finds the last trial running in the other process says so, and ends with 1.
    assert 0 in codes
    assert codes <= {0, 1}
    study = Study(tmp_path / "results" / "killed")
    records, unreadable = study.scan()
    assert unreadable == []
    assert len(records) == 40
    assert {record.outcome.status for record in records} == {"ok"}
    # Nothing was measured twice.
    assert not (study.trials / "superseded").exists()
