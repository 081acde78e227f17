"""The command lines that users type, as they type them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.conftest import Checkout

SWEEP = (
    "-m",
    "attention.n_hashes=1,2,4,8",
    "attention.n_buckets=32,64",
    "attention.chunk_length=32,64",
    "model.residual=plain,reversible",
    "seed=0,1,2",
    "study=mine",
)
#: Keeps each trial of it below a tenth of a second.
BRIEF = ("workload=train_step", "workload.timed_steps=1", "workload.warmup_steps=0", "task.length=64",
         "train.batch_size=1")  # fmt: skip


@pytest.mark.slow
def test_the_sweep_over_four_factors_and_seeds(checkout: Checkout) -> None:
    planned = checkout.harness("plan", *SWEEP)
    assert planned.code == 0, planned.err
    assert planned.out.startswith("study mine: 96 trials (96 new), 96 to run")

    done = checkout.harness("run", *SWEEP, *BRIEF)
    assert done.code == 0, done.out + done.err
    assert "96 of 96 trials" in done.out
    report = checkout.cwd / "results" / "mine" / "report"
    trials = pd.read_csv(report / "trials.csv")
    swept = [
        "attention.n_hashes", "attention.n_buckets", "attention.chunk_length", "model.residual", "seed"
    ]  # fmt: skip
    assert len(trials.drop_duplicates(swept)) == len(trials) == 96
    measured = ["peak_alloc_bytes", "peak_rss_bytes", "saved_bytes", "tokens_per_s", "forward_s",
                "backward_s", "optimizer_s", "flops"]  # fmt: skip
    assert trials[measured].gt(0).all(axis=None)
    effects = pd.read_csv(report / "effects.csv")
    assert set(effects["factor"]) == set(swept) - {"seed"}
    assert (effects["n_pairs"] > 0).all()

    again = checkout.harness("run", *SWEEP, *BRIEF)
    assert "(96 done), 0 to run" in again.out


def test_a_preset_on_another_device_in_another_place(checkout: Checkout, tmp_path: Path) -> None:
    line = ["run", "experiment=quick", f"results_dir={tmp_path}/somewhere", "dtype=bfloat16"]
    refused = checkout.harness(*line, "device=cuda")
    if refused.code == 0:
        return
    assert refused.code == 2
    (complaint,) = refused.err.splitlines()
    assert complaint.startswith("harness: ")
    assert "cuda" in complaint
    assert not (tmp_path / "somewhere").exists()

    done = checkout.harness(*line, *BRIEF[:3], "attention.n_hashes=1", "threads=1")
    assert done.code == 0, done.out + done.err
    records = [json.loads(path.read_text()) for path in (tmp_path / "somewhere/quick/trials").glob("*.json")]
    assert len(records) == 9
    assert {record["spec"]["dtype"] for record in records} == {"bfloat16"}
