"""A sweep from another shell."""

from __future__ import annotations

import json

from harness.claims import claimed
from harness.protocol import PROGRESS_PREFIX
from harness.status import status_of
from tests.harness.conftest import Shell


def test_a_study_that_is_done(shell: Shell) -> None:
    shell.fake("run", "-m", "workload.does=succeed,raise", "study=mine")
    lines = shell("status", "mine").out.splitlines()
    assert lines[0] == "study mine: 2 of 2 trials ended (1 ok, 1 error)"
    assert lines[1] == "  latest"
    assert sorted(line.split()[0] for line in lines[2:]) == ["error", "ok"]


def test_what_runs_says_where_it_is_and_what_is_left_gets_a_time(shell: Shell) -> None:
    shell.fake("run", "-m", "workload.seconds=0.1,0.2,0.3", "study=mine")
    study = shell.study("mine")
    first, second, third = (record.trial_id for record in shell.records("mine"))
    study.record_path(second).unlink()
    study.record_path(third).unlink()
    study.log_path(second).write_text(f"{PROGRESS_PREFIX}step 3/4 loss 0.5\n")
    with claimed(study, second, timeout_s=None):
        status = status_of(study)
        out = shell("status", "mine").out
    assert (status.planned, status.waiting, status.outcomes) == (3, 1, {"ok": 1})
    (running,) = status.running
    assert (running.trial_id, running.word) == (second, "step 3/4 loss 0.5")
    assert running.label.startswith("seconds=0.")
    assert status.eta_s is not None
    assert "study mine: 1 of 3 trials ended (1 ok)" in out
    assert f"  running  {running.label}  step 3/4 loss 0.5  0:0" in out
    assert "  left     1 waiting, about 0:0" in out
    stopped = shell("status", "mine").out
    assert "  2 trials left, and nothing runs: the same command does the rest" in stopped
    assert first in {record.trial_id for record in shell.records("mine")}


def test_json_and_watching_a_study_with_nothing_left(shell: Shell) -> None:
    shell.fake("run", "study=mine")
    assert json.loads(shell("status", "mine", "--json").out)["outcomes"] == {"ok": 1}
    assert shell("status", "mine", "--watch", "0.1").code == 0


def test_one_line_for_what_cannot_be(shell: Shell) -> None:
    shell.fake("run", "study=mine")
    assert "no study 'mime' in results; did you mean 'mine'?" in shell("status", "mime").complaint
    assert "--watch 0: give between" in shell("status", "mine", "--watch", "0").complaint
