"""list, show and rm."""

from __future__ import annotations

import json
import shlex

import pytest

from harness import commands
from harness.claims import claimed
from tests.harness.conftest import FAKE_CONF, Shell


def test_list_of_nothing(shell: Shell) -> None:
    assert shell("list").out == "no studies in results; 'harness run experiment=quick' makes one\n"


def test_list_of_studies(shell: Shell) -> None:
    shell.fake("run", "-m", "workload.does=succeed,raise", "study=mine")
    (shell.study("mine").trials / "torn.json").write_text("{")
    lines = shell("list").out.splitlines()
    assert lines[0].split() == ["study", "trials", "outcomes", "experiment", "last"]
    assert lines[1].startswith("mine   2       1 ok, 1 error, 1 unreadable  default     20")


@pytest.mark.parametrize(("what", "name"), [("tasks", "copy "), ("families", "cross_polytope ")])
def test_list_of_what_can_be_chosen(what: str, name: str, shell: Shell) -> None:
    (line,) = [line for line in shell("list", what).out.splitlines() if line.startswith(name)]
    assert len(line) > len(name) + 10


def test_list_of_something_else(shell: Shell) -> None:
    result = shell("list", "animals")
    assert result.code == 2
    assert "invalid choice: 'animals'" in result.complaint


def test_show_tells_outcome_log_and_the_command_that_repeats_it(shell: Shell) -> None:
    shell.fake("run", "-m", "workload.does=raise,succeed", "workload.seconds=0.1", "threads=1", "study=mine")
    failed = next(record for record in shell.records("mine") if record.outcome.status == "error")
    result = shell("show", failed.trial_id[:6])
    assert result.code == 0
    assert "outcome  error: LookupError: the model was not there" in result.out
    assert "cell     workload.does=raise seed=0" in result.out
    assert "  progress: step 1/2 of raise" in result.out
    assert "in _raise" in result.out
    (line,) = [line for line in result.out.splitlines() if line.startswith("repeat")]
    words = shlex.split(line.removeprefix("repeat"))
    assert words[:3] == ["harness", "run", "workload=fake"]
    again = shell.fake("run", *words[3:])
    assert "1 trial (1 failed), 1 to run" in again.out


def test_the_repeating_command_of_a_union_means_one_trial(shell: Shell) -> None:
    shell.fake("run", "experiment=fake_union", "workload.seconds=0.1", "threads=1")
    records = shell.records("fake_union")
    assert len({record.cell["task"] for record in records}) == 2
    for record in records:
        (line,) = [
            line for line in shell("show", record.trial_id).out.splitlines() if line.startswith("repeat")
        ]
        words = shlex.split(line.removeprefix("repeat"))
        plan = shell("plan", "-cd", FAKE_CONF, *words[2:])
        assert "1 trial (1 done), 1 to run" in plan.out
        assert record.trial_id in plan.out


def test_show_as_json(shell: Shell) -> None:
    shell.fake("run")
    (record,) = shell.records()
    assert json.loads(shell("show", record.trial_id, "--json").out)["trial_id"] == record.trial_id


def test_show_of_what_is_not_there_or_not_clear(shell: Shell) -> None:
    assert "no trial 'abc' in any study" in shell("show", "abc").complaint
    shell.fake("run", "-m", "seed=0,1")
    ambiguous = shell("show", "")
    assert ambiguous.code == 2
    assert "begins 2 trials" in ambiguous.complaint
    assert "no study 'other'" in shell("show", "abc", "--study", "other").complaint


def test_show_of_a_torn_record(shell: Shell) -> None:
    shell.fake("run")
    (path,) = shell.study().trials.glob("*.json")
    path.write_text("{")
    result = shell("show", path.stem)
    assert result.code == 2
    assert "cannot be read: not JSON" in result.complaint


def test_show_of_a_record_from_elsewhere_has_no_command(shell: Shell) -> None:
    shell.fake("run")
    (shell.study().path / "study.json").unlink()
    (record,) = shell.records()
    assert "repeat" not in shell("show", record.trial_id).out


def test_rm_asks(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    shell.fake("run")
    refused = shell("rm", "default")
    assert refused.code == 2
    assert "give --yes" in refused.complaint
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    for answer, code in (("n", 1), ("", 1), ("Yes ", 0)):
        monkeypatch.setattr("builtins.input", lambda _, answer=answer: answer)
        assert shell("rm", "default").code == code
    assert not shell.study().path.exists()


def test_rm_without_asking_and_of_nothing(shell: Shell) -> None:
    shell.fake("run")
    assert shell("rm", "default", "--yes").out.startswith("deleted results")
    assert shell("rm", "default", "--yes").code == 2


@pytest.mark.parametrize("name", ["precious", "results/precious", "./precious"])
def test_rm_spares_what_is_no_study_of_the_results_folder(name: str, shell: Shell) -> None:
    for folder in (shell.folder / "precious", shell.folder / "results" / "precious"):
        (folder / "trials").mkdir(parents=True)
        (folder / "thesis.tex").touch()
    result = shell("rm", name, "--yes")
    assert result.code == 2
    assert len(result.complaint.splitlines()) == 1
    assert len(list(shell.folder.rglob("thesis.tex"))) == 2


def test_rm_spares_what_a_link_leads_to(shell: Shell) -> None:
    shell.fake("run")
    shell.study("link").path.symlink_to(shell.study().path)
    result = shell("rm", "link", "--yes")
    assert result.code == 2
    assert "is a link to" in result.complaint
    assert shell.records()


def test_rm_spares_published_studies(shell: Shell) -> None:
    shell.fake("run", "study=pub")
    published = shell.folder / "results" / "reference" / "pub"
    published.parent.mkdir()
    (shell.folder / "results" / "pub").rename(published)
    assert shell("rm", "results/reference/pub", "--yes").code == 2
    assert published.exists()


def test_rm_spares_a_study_that_is_running(shell: Shell) -> None:
    shell.fake("run")
    with claimed(shell.study(), "abc", timeout_s=None):
        result = shell("rm", "default", "--yes")
    assert result.code == 2
    assert "is running (1 trial claimed)" in result.complaint


def test_a_config_file_without_a_word_about_itself(shell: Shell) -> None:
    path = shell.folder / "x.yaml"
    path.write_text("# @package _global_\n\na: 1\n# late\n")
    assert commands._summary(path) == ""


def test_the_summary_of_a_config_file_is_its_first_sentence(shell: Shell) -> None:
    path = shell.folder / "x.yaml"
    path.write_text(
        "# @package _global_\n# Small enough\n# for two cores. More on that.\n#\n# And more.\na: 1\n"
    )
    assert commands._summary(path) == "Small enough for two cores."
