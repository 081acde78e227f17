"""What shells offer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import cli, completion
from tests.harness.conftest import Shell


@pytest.fixture
def offered(shell: Shell) -> Callable[[str], list[str]]:
    def ask(line: str) -> list[str]:
        return shell("completion", "query", line).out.splitlines()

    return ask


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("harness ru", ["run"]),
        ("harness run experiment=ha", ["experiment=hash_families", "experiment=hash_rounds"]),
        ("harness plan -m experiment=hash_rounds,bu", ["experiment=hash_rounds,buckets"]),
        ("harness run attention.n_ha", ["attention.n_hashes="]),
        ("harness run --multi", ["--multirun"]),
        ("harness plan --sp", ["--specs"]),
        ("harness list ta", ["tasks"]),
        ("harness status --wa", ["--watch"]),
        ("harness completion fi", ["fish"]),
        ("harness baseline s", ["save"]),
        ("harness nonsense x", [""]),
        ("harness run nonsense=", [""]),
        ("harness", [""]),
    ],
)
def test_words_that_fit(line: str, expected: list[str], offered: Callable[[str], list[str]]) -> None:
    assert offered(line) == expected


def test_studies_and_trials_are_offered(shell: Shell, offered: Callable[[str], list[str]]) -> None:
    shell.fake("run", "study=mine")
    (record,) = shell.records("mine")
    assert offered("harness report ") == ["mine"]
    assert offered(f"harness show {record.trial_id[:3]}") == [record.trial_id]
    assert offered("harness show x --study ") == ["mine"]
    assert offered("harness report --results-dir nowhere ") == [""]


def test_every_command_is_offered(offered: Callable[[str], list[str]]) -> None:
    assert set(cli._COMMANDS) <= set(offered("harness "))


@pytest.mark.parametrize("shell_name", completion.SHELLS)
def test_the_scripts_are_understood_by_their_shells(shell_name: str, shell: Shell) -> None:
    script = shell("completion", shell_name).out
    assert "completion query" in script
    if shutil.which(shell_name) is not None:
        done = subprocess.run([shell_name, "-n"], input=script, text=True, capture_output=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes_with_a_break_at_the_equals_sign(tmp_path: Path, shell: Shell) -> None:
    """The script in a real bash, with a harness that answers for itself."""
    fake = tmp_path / "harness"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" experiment=hash_families experiment=hash_rounds\n')
    fake.chmod(0o755)
    script = shell("completion", "bash").out
    line = f"{fake} run experiment=ha"
    ask = f"""{script}
COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_WORDS=({fake} run experiment = ha); COMP_CWORD=4
_harness 2>/dev/null; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hash_families", "hash_rounds"]
