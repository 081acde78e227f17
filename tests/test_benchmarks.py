"""The micro-benchmarks run, and nothing but `make bench` collects them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = "tests/benchmarks/test_operators.py"


def run_pytest(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--confcutdir=tests/benchmarks", *argv]
    # Interpreted, the kernels of a GPU would be timed too, for minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=250
    )


def test_without_being_asked_for_they_are_no_tests() -> None:
    done = run_pytest("--collect-only", "tests/benchmarks")
    assert done.returncode == 5, done.stdout
    assert "no tests collected" in done.stdout


@pytest.mark.slow
def test_each_of_them_runs() -> None:
    done = run_pytest("--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0", FILE)
    assert done.returncode == 0, done.stdout
    for name in ("hash", "sort", "gather", "chunk_attention", "combine", "backward", "language_model_step"):
        assert f"test_{name}" in done.stdout
