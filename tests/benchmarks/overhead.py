"""What a trial costs beyond its own work: Hydra's composing, the fork, the record; planning apart.

    python -m tests.benchmarks.overhead --trials 60

A sweep of trials that do nothing is run as typed; the time from the start of one to the start of the next is
overhead alone.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from harness.store import Study
from tests.harness.conftest import FAKE_CONF, harness_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", f"task.n_symbols=range(3,{3 + arguments.trials})", "threads=1", "study=overhead"]
        command = [sys.executable, "-m", "harness", "run", "-cd", str(FAKE_CONF), "workload=fake", *words]
        environment = {**harness_environment(), "HARNESS_ALLOW_TARGETS": "tests."}
        started = time.monotonic()
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        whole = time.monotonic() - started
        records, _ = Study(Path(folder) / "results" / "overhead").scan()
    starts = [datetime.fromisoformat(record.started_at).timestamp() for record in records]
    apart = [later - earlier for earlier, later in itertools.pairwise(starts[1:])]
    high = statistics.quantiles(apart, n=10)[-1]
    print(
        f"{len(records)} trials that do nothing: {whole:.1f} s with planning, Python's start and the report"
    )
    print(
        f"from one trial to the next: median {statistics.median(apart):.3f} s, 90th percentile {high:.3f} s"
    )


if __name__ == "__main__":
    main()
