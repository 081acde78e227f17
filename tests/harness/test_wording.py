"""One line for what a user got wrong."""

from __future__ import annotations

import pytest

from harness import wording

KEYS = ["attention", "attention.n_hashes", "evaluate", "evaluate.n_hashes", "model.d_model", "seed"]


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("attention.n_hashs", "did you mean 'attention.n_hashes'?"),
        ("n_hashes", "did you mean 'attention.n_hashes' or 'evaluate.n_hashes'?"),
        ("model.seed", "did you mean 'seed'?"),
        ("sead", "did you mean 'seed'?"),
        ("wholly.other", "'harness run --cfg job' prints every key"),
    ],
)
def test_unknown_key(key: str, hint: str) -> None:
    assert wording.unknown_key(key, KEYS) == f"unknown key {key!r}; {hint}"


def test_unknown_option_without_any_options() -> None:
    assert wording.unknown_option("task", "x", []) == "task=x: no such task; there are: none"


def test_one_line_has_no_breaks_and_an_end() -> None:
    assert wording.one_line("a\n  b\tc") == "a b c"
    assert len(wording.one_line("x" * 1000)) == 600


def test_flat_keys() -> None:
    assert wording.flat_keys({"a": {"b": {"c": 1}}, "d": 2}) == ["a", "a.b", "a.b.c", "d"]
