"""The gate on trials that were really run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import ROOT, Checkout, Done

BASELINE = ROOT / "results" / "baselines" / "ci.json"
#: A small part of `experiment=ci`.
PART = ("experiment=ci", "attention.n_hashes=1", "model.residual=plain", "seed=0")


@pytest.fixture(scope="module")
def study(checkout: Checkout) -> Checkout:
    """The checkout with `experiment=ci` run."""
    done = checkout.harness("run", "experiment=ci")
    assert done.code == 0, done.out + done.err
    return checkout


def gate(checkout: Checkout, tmp_path: Path, *words: object) -> tuple[Done, list[dict[str, Any]]]:
    """What `harness gate` says, and its verdicts on what decides."""
    done = checkout.harness("gate", *words, "--json", tmp_path / "gate.json")
    cells = json.loads((tmp_path / "gate.json").read_text())["cells"]
    return done, [cell for cell in cells if cell["decides"]]


def test_the_checkout_passes_its_committed_baseline(study: Checkout, tmp_path: Path) -> None:
    done, cells = gate(study, tmp_path, "ci", "--baseline", BASELINE)
    found = {cell["verdict"] for cell in cells}
    if done.code == 3:
        # Bytes and counts are exact on equal machines only: on another one its own baseline must do.
        assert "incomparable" in found, done.out
        assert "regressed" not in found, done.out
        assert study.harness("baseline", "save", "ci", "--as", "here").code == 0
        done, cells = gate(study, tmp_path, "ci", "--baseline", "here")
    assert done.code == 0, done.out + done.err
    assert {cell["metric"] for cell in cells} >= {"peak_alloc_bytes", "saved_bytes", "flops", "accuracy"}


def test_what_a_trial_measures_is_the_same_again(study: Checkout, tmp_path: Path) -> None:
    again = study.harness("run", *PART, "study=again")
    assert again.code == 0, again.out + again.err
    first, second = (
        {
            path.stem: json.loads(path.read_text())
            for path in (study.cwd / "results" / name).glob("trials/*.json")
        }
        for name in ("ci", "again")
    )
    assert len(second) == 1
    for trial_id, record in second.items():
        assert record["outcome"] == first[trial_id]["outcome"]
        for name in ("peak_alloc_bytes", "saved_bytes", "flops", "operators", "correct", "nll_nats"):
            assert values(record, name) == values(first[trial_id], name), name


def values(record: dict[str, Any], metric: str) -> list[list[float]]:
    found = [sample["values"] for sample in record["samples"] if sample["metric"] == metric]
    assert found, metric
    return found


def before_an_edit(copied: Checkout, tmp_path: Path) -> None:
    """A study and the baseline made of it."""
    assert copied.harness("run", *PART).code == 0
    assert copied.harness("baseline", "save", "ci", "--as", "before").code == 0
    assert gate(copied, tmp_path, "ci", "--baseline", "before")[0].code == 0


def after_an_edit(copied: Checkout, tmp_path: Path) -> tuple[Done, set[str]]:
    """The gate's answer to the edited code, and the metrics that it says regressed."""
    stale = copied.harness("gate", "ci", "--baseline", "before")
    assert stale.code == 3
    assert "1 of 1 trials of ci were measured with other code" in stale.err
    # The preset measures again what is stale.
    assert "(1 stale)" in copied.harness("plan", *PART).out
    again = copied.harness("run", *PART)
    assert again.code == 0, again.out + again.err
    done, cells = gate(copied, tmp_path, "ci", "--baseline", "before")
    return done, {cell["metric"] for cell in cells if cell["verdict"] == "regressed"}


#: An edit that makes the code worse, and the metric that must tell: a file, its line, what becomes of it.
PLANTED = {
    "one copy more": (
        "feed_forward",
        "self._activate(self.wide(x))",
        "self._activate(self.wide(x).clone())",
        "operators",
    ),
    "more kept for backward": (
        "feed_forward",
        "self._activate(self.wide(x))",
        "self._activate(self.wide(x)).exp().log()",
        "saved_bytes",
    ),
    "all tokens in one bucket": (
        "hashing/signed_axes",
        "ids, stride = nearest_signed_axis(first)",
        "ids, stride = nearest_signed_axis(first).mul(0)",
        "accuracy",
    ),
}
#: The edit that every run of the tests plants; the slow ones plant the others.
PLANTED_FIRST = "one copy more"


@pytest.mark.parametrize("name", PLANTED)
def test_the_lines_to_be_edited_are_in_the_code(name: str) -> None:
    path, line, _, _ = PLANTED[name]
    assert (ROOT / "reformer" / f"{path}.py").read_text(encoding="utf-8").count(line) == 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != PLANTED_FIRST)) for name in PLANTED]
)
def test_a_planted_regression_fails_the_gate(copied: Checkout, tmp_path: Path, name: str) -> None:
    path, line, worse, metric = PLANTED[name]
    before_an_edit(copied, tmp_path)
    copied.edit(f"reformer/{path}.py", line, worse)
    done, regressed = after_an_edit(copied, tmp_path)
    assert done.code == 1, done.out
    assert metric in regressed


@pytest.mark.slow
def test_an_edit_that_changes_no_number_is_measured_again_and_passes(
    copied: Checkout, tmp_path: Path
) -> None:
    before_an_edit(copied, tmp_path)
    copied.edit("reformer/blocks.py", "return function(x)", "return function(x)  # all rows")
    done, regressed = after_an_edit(copied, tmp_path)
    assert (done.code, regressed) == (0, set()), done.out
