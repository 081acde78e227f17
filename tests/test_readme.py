"""What the README shows is there and runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("page", PAGES)
def test_presets_and_make_targets_are_real(page: str) -> None:
    text = text_of(page)
    known = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    named = {name for names in re.findall(r"experiment=([a-z_,]+)", text) for name in names.split(",")}
    assert named
    assert named <= known
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake (demo|test-slow|test|check|format)\b", text)) <= targets


def test_nothing_is_left_to_fill_in() -> None:
    assert re.findall(r"@[A-Z]+@", text_of("README.md")) == []
