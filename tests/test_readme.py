"""What the README shows is there and runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import harness

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page: str) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", text_of(page))
    assert [target for target in targets if not (ROOT / target).exists()] == []


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", text_of("README.md"), re.DOTALL))
def test_examples_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_the_parts_that_contributing_shows_work(tmp_path: Path) -> None:
    """Its blocks are files, named by their first comment."""
    for block in re.findall(r"```(?:python|yaml)\n(.*?)```", text_of("CONTRIBUTING.md"), re.DOTALL):
        (name,) = re.findall(r"^# (parts/\S+?):?(?: |\n)", block, re.MULTILINE)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block, encoding="utf-8")
    environment = {
        **os.environ,
        "HARNESS_ALLOW_TARGETS": "parts.",
        "PYTHONPATH": os.pathsep.join(filter(None, (".", os.environ.get("PYTHONPATH")))),
    }
    (typed,) = re.findall(r"^    harness (run -cd .*)$", text_of("CONTRIBUTING.md"), re.MULTILINE)
    for words in (typed.split(), ["run", "-cd", "parts/conf", "experiment=reverse_rounds"]):
        argv = [sys.executable, "-m", "harness", *words, "threads=1"]
        done = subprocess.run(
            argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
    rows = harness.load(tmp_path / "results" / "default")
    assert rows["parameter_bytes"].item() > 1000
    assert set(harness.load(tmp_path / "results" / "reverse_rounds")["task"]) == {"reverse"}


@pytest.mark.parametrize("page", PAGES)
def test_presets_and_make_targets_are_real(page: str) -> None:
    text = text_of(page)
    known = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    known.add("reverse_rounds")  # the example
    named = {name for names in re.findall(r"experiment=([a-z_,]+)", text) for name in names.split(",")}
    assert named
    assert named <= known
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake (demo|test-slow|test|check|format|bench)\b", text)) <= targets


def test_every_row_of_the_comparison_can_be_asked_for() -> None:
    from tests.benchmarks import published_differences

    shown = re.findall(
        r"^\| `(\w+)` \| .* \|.*\|.*\|$",
        text_of("README.md").split("## How ours differs")[1].split("\nWhy:")[0],
        re.MULTILINE,
    )
    assert shown == list(published_differences.ROWS)


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"@[A-Z]+@", text_of("README.md")) == []
