"""What measuring costs: tokens a second of a measured training loop beside a bare one.

    python -m tests.benchmarks.bare_loop --blocks 15 --steps 20

Both train a copy of one model on the same batches, in this process, in turns of some steps: ours as the
workload `train` does it, with its stopwatch and its eye on others; the bare one as one would write it without
a harness.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
from torch import nn

from harness.codec import decode
from harness.probes import OthersWatch, Stopwatch, Together
from harness.workloads.session import Session, open_session
from tests.harness.specs import plain_spec


def bare_steps(session: Session, *, first: int, steps: int) -> float:
    """Seconds of a loop without a harness."""
    model, optimizer, clip = session.model, session.optimizer, session.spec.train.clip
    started = time.perf_counter()
    for step in range(first, first + steps):
        tokens, targets = session.batch(step)
        loss = session.ours.loss(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
    return time.perf_counter() - started


def measured_steps(session: Session, probe: Together, *, first: int, steps: int) -> float:
    """Seconds of the same by the harness."""
    started = time.perf_counter()
    for step in range(first, first + steps):
        float(session.train_step(session.batch(step), step=step, probe=probe))
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--steps", type=int, default=20, help="steps a turn")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    spec = decode(
        plain_spec(
            task__length=arguments.length,
            train__batch_size=8,
            train__warmup_steps=0,
            model__d_model=128,
            model__n_layers=2,
            attention__n_buckets=None,
            attention__chunk_length=32,
            threads=arguments.threads,
        )
    )
    bare, ours = open_session(spec), open_session(spec)
    probe = Together(OthersWatch(), Stopwatch(ours.device))
    ratios, bare_s = [], []
    for block in range(arguments.blocks + 1):
        first, turn = block * arguments.steps, {"first": block * arguments.steps, "steps": arguments.steps}
        if block % 2:
            theirs, mine = bare_steps(bare, **turn), measured_steps(ours, probe, **turn)
        else:
            mine, theirs = measured_steps(ours, probe, **turn), bare_steps(bare, **turn)
        if first:
            ratios.append(theirs / mine)
            bare_s.append(theirs / arguments.steps)
    for one, other in zip(bare.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other), "the two loops did not do the same"
    logs = [math.log(ratio) for ratio in ratios]
    mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(mean - 2 * error), math.exp(mean + 2 * error)
    tokens = spec.train.batch_size * spec.task.length
    print(f"bare loop {tokens / statistics.median(bare_s):,.0f} tokens/s ({arguments.threads} threads)")
    print(f"measured / bare: {math.exp(mean):.4f} [{low:.4f}, {high:.4f}] over {len(ratios)} pairs of turns")


if __name__ == "__main__":
    main()
