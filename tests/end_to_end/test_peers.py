"""`experiment=peers` as users type it, on sequences short enough to wait for."""

from __future__ import annotations

import pandas as pd

from tests.end_to_end.conftest import Checkout

SMALL = ("model.d_model=64", "workload.timed_steps=1", "threads=1")
LAYERS = {
    "ours": "ours",
    "sdpa": "SDPA",
    "transformers": "transformers",
    "reformer_pytorch": "reformer_pytorch",
}


def test_every_implementation_is_measured_and_compared(checkout: Checkout) -> None:
    line = ("experiment=peers", "task.length=128,256", "repeat=0,1", *SMALL)
    done = checkout.harness("run", *line)
    assert done.code == 0, done.out + done.err
    assert "16 of 16 trials" in done.out
    report = checkout.cwd / "results" / "peers" / "report"
    trials = pd.read_csv(report / "trials.csv")
    assert set(trials["implementation"]) == set(LAYERS)
    measured = ["forward_s", "backward_s", "peak_alloc_bytes", "saved_bytes", "flops", "floor_s",
                "share_of_floor", "ratio_to_best_peer", "ratio_to_sdpa"]  # fmt: skip
    assert trials[measured].gt(0).all(axis=None)
    backends = trials.groupby("implementation")["backend"].unique()
    assert backends["sdpa"].tolist() == ["sdpa"]
    assert backends["transformers"].tolist() == ["transformers"]
    assert (report / "figures" / "scaling.svg").exists()
    text = (report / "report.md").read_text(encoding="utf-8")
    part = text.split("## Beside the peers")[1]
    assert all(f"| {layer} " in part for layer in LAYERS.values())

    planned = checkout.harness("plan", *line)
    assert "(16 done), 0 to run" in planned.out
    assert " reformer_pytorch  ok" in planned.out


def test_a_peer_that_cannot_is_told_in_one_line(checkout: Checkout) -> None:
    done = checkout.harness(
        "run", "workload=attention", "implementation=transformers", "attention.causality=strict"
    )
    assert done.code == 2
    assert done.err == (
        "harness: attention.causality=strict: transformers computes published; "
        "use attention.causality=published\n"
    )
