"""How the harness bears many trials: seconds and memory of every command on a study of 10,000.

    python -m tests.benchmarks.scale --trials 10000 --folder /tmp/scale

The sweep is planned for real; then a record with synthetic numbers is written for each of its trials, so that
the same plan finds all of them done. Each command runs in a process of its own, Python's start included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from harness.environment import code_fingerprint
from harness.record import to_json
from harness.store import Study
from tests.harness import factory

STUDY = "scale"
LEVELS = {
    "attention.n_hashes": "1,2,4,8",
    "attention.n_buckets": "16,32",
    "attention.chunk_length": "8,16",
    "model.residual": "plain,reversible",
}
SETTINGS = 4 * 2 * 2 * 2
ROOT = Path(__file__).parents[2]


def measure(name: str, words: Sequence[str], *, folder: Path, expected: Sequence[int] = (0,)) -> str:
    """Run one command and print what it took; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out:
        started, peak = time.monotonic(), 0
        process = psutil.Popen(
            [sys.executable, "-m", "harness", *words],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.02)
        took = time.monotonic() - started
        out.seek(0)
        text = out.read()
    if process.returncode not in expected:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}: {text[-2000:]}")
    print(f"{name:28} {took:7.2f} s {peak / 2**20:8.0f} MiB", flush=True)
    return text


def _resident(process: psutil.Popen) -> int:
    """Of the command itself: the measuring process that it may have started is apart."""
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def write_records(lines: Sequence[str], study: Study) -> None:
    """A record with synthetic numbers for each planned trial."""
    study.create()
    code = code_fingerprint()
    for line in lines:
        planned = json.loads(line)
        cell = {key: level for key, level in planned["cell"].items() if key in LEVELS or key == "seed"}
        record = replace(
            factory.record(cell, experiment=STUDY),
            trial_id=planned["trial_id"],
            spec=planned["spec"],
            cell=planned["cell"],
            code=code,
        )
        study.record_path(record.trial_id).write_text(to_json(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the study is made (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        seeds = -(-arguments.trials // SETTINGS)
        sweep = ["-m", *(f"{key}={levels}" for key, levels in LEVELS.items()), f"seed=range({seeds})"]
        sweep += [f"study={STUDY}", "results_dir=results"]
        print(f"{seeds * SETTINGS} trials: {SETTINGS} settings, {seeds} seeds")
        measure("plan", ["plan", *sweep, "--specs", "specs.jsonl"], folder=folder)
        study = Study(folder / "results" / STUDY)
        lines = (folder / "specs.jsonl").read_text().splitlines()
        write_records(lines, study)
        text = measure("plan, all done", ["plan", *sweep], folder=folder)
        assert f"{len(lines)} done" in text, text[:300]
        measure("run, nothing left", ["run", *sweep], folder=folder)
        measure("list", ["list"], folder=folder)
        measure("status", ["status", STUDY], folder=folder)
        measure("show", ["show", json.loads(lines[-1])["trial_id"]], folder=folder)
        measure("report", ["report", STUDY], folder=folder)
        measure("baseline save", ["baseline", "save", STUDY, "--as", "scale"], folder=folder)
        measure("gate", ["gate", STUDY, "--baseline", "scale"], folder=folder, expected=(0, 5))


if __name__ == "__main__":
    main()
