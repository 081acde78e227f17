"""Do the instruments of this machine tell the truth? `harness doctor`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.arguments import Parser
from harness.errors import EXIT_FAILED, EXIT_OK, HarnessError
from harness.locks import device_lock
from harness.metrics.time import DISTURBED
from harness.record import Measurement, RecordError, measurement_from_json
from harness.server import ForkServer, ServerError, process_server
from harness.store import write_atomically

#: How far an estimate of known bytes may be off, as a share.
_MEMORY_TOLERANCE = 0.02
#: How much longer than it should a sleep may seem: the kernel wakes nobody at once.
_SLEEP_TOLERANCE_S = 0.005
#: Operations of the product that the workload `self_test` computes, 37×53 by 53×71.
_PRODUCT_FLOPS = 2 * 37 * 53 * 71
#: A trial may cost this much beyond its own work.
_OVERHEAD_S = 0.25
_PROCESSES = 6
#: Of the smallest effect that is found in 80 % of all cases at a two-sided level of 5 %.
_Z = 1.960 + 0.842
_PAIRS = (8, 16, 32)
_LAUNCHERS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit (Slurm)": "hydra_plugins.hydra_submitit_launcher",
    "ray": "hydra_plugins.hydra_ray_launcher",
}

#: Composes the workload `self_test` from overrides into the plain data of a spec.
Compose = Callable[[list[str]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Args:
        verdict: `ok`; `lies`, an instrument that is wrong; `note`, what is missing or worth knowing.
    """

    name: str
    verdict: str
    detail: str


def main(argv: Sequence[str], *, compose: Compose) -> int:
    """`harness doctor [KEY=VALUE …]`."""
    parser = Parser(
        prog="harness doctor",
        description="Let every instrument measure something known, and say which of them cannot be trusted "
        "here: memory, time, operations, isolation, locks, launchers, data. A piece of work takes turns with "
        "itself (an A/A run), which tells the smallest difference in speed that this machine can show.",
        epilog="examples:\n  harness doctor\n  harness doctor device=cuda threads=1\n"
        "  harness doctor --json\n\nexit codes: 0 all instruments tell the truth, 1 one lies, 2 wrong usage",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="device, threads, workload.…")
    parser.add_argument(
        "--results-dir", type=Path, default=Path("results"), metavar="DIR", help="where studies are (results)"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    arguments = parser.parse_args(argv)
    config = compose(["workload=self_test", *arguments.overrides])
    checks = []
    for check in examine(config, results_dir=arguments.results_dir):
        checks.append(check)
        if not arguments.json:
            print(f"{check.verdict:5} {check.name:22} {check.detail}", flush=True)
    lying = [check.name for check in checks if check.verdict == "lies"]
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        print(f"{', '.join(lying)}: not to be trusted here" if lying else "the instruments tell the truth")
    return EXIT_FAILED if lying else EXIT_OK


def examine(config: Mapping[str, Any], *, results_dir: Path) -> Iterator[Check]:
    """All findings, one after the other.

    Args:
        config: the composed workload `self_test`.
        results_dir: where studies are, or will be.

    Raises:
        HarnessError: the trial that measures cannot be run at all.
    """
    server = process_server()
    try:
        (decoded,) = server.decode([config], check_device=True)
        if decoded.spec is None:
            raise HarnessError(decoded.error)
        first = _run(server, decoded.spec)
        yield from _memory(first.measurement, decoded.spec)
        yield from _time(first.measurement, decoded.spec)
        yield _operations(first.measurement)
        yield _threads(first.measurement, decoded.spec)
        runs = [first, *(_run(server, decoded.spec) for _ in range(_PROCESSES - 1))]
        yield _isolation(runs)
        yield from _noise([run.measurement for run in runs])
    finally:
        server.close()
    yield from _places(results_dir)
    yield from _software(first.measurement)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A trial and the seconds from asking for it to having its answer."""

    measurement: Measurement
    seconds: float

    @property
    def own_seconds(self) -> float:
        """What it took in its own eyes."""
        (seconds,) = _values(self.measurement, "trial_s")
        return seconds


def _run(server: ForkServer, spec: Mapping[str, Any]) -> _Run:
    """One trial of the workload, in a process of its own."""
    out, log = server.scratch() / "doctor.json", server.scratch() / "doctor.log"
    started = time.monotonic()
    try:
        ending = server.run(spec, out=out, log=log, timeout_s=120.0)
        measurement = measurement_from_json(out.read_text(encoding="utf-8"))
    except (OSError, RecordError, ServerError) as error:
        raise HarnessError(f"the trial that measures what is known left nothing: {error}") from error
    if ending.exit != 0 or measurement.outcome.status != "ok":
        raise HarnessError(f"the trial that measures what is known failed: {measurement.outcome.message}")
    return _Run(measurement=measurement, seconds=time.monotonic() - started)


def _values(measurement: Measurement, metric: str) -> tuple[float, ...]:
    return next((sample.values for sample in measurement.samples if sample.metric == metric), ())


# What is known


def _memory(measurement: Measurement, spec: Mapping[str, Any]) -> Iterator[Check]:
    held = spec["workload"]["mebibytes"] * 2**20
    method = measurement.environment.get("mem_method", "")
    for metric, expected, words in (
        ("peak_alloc_bytes", held, "the allocator's peak"),
        ("saved_bytes", held // 2, "bytes that stay"),
        ("peak_rss_delta_bytes", held, f"resident memory ({method})"),
    ):
        (found,) = _values(measurement, metric) or (math.nan,)
        detail = f"{words}: {found / 2**20:.2f} MiB of {expected / 2**20:g} MiB"
        yield Check(name=metric, verdict=_near(found, expected, share=_MEMORY_TOLERANCE), detail=detail)


def _near(found: float, expected: float, *, share: float) -> str:
    return "ok" if abs(found / expected - 1) <= share else "lies"


def _time(measurement: Measurement, spec: Mapping[str, Any]) -> Iterator[Check]:
    sleep_s = spec["workload"]["sleep_s"]
    found = min(_values(measurement, "forward_s"), default=math.nan)
    late = found - sleep_s
    yield Check(
        name="clock",
        verdict="ok" if 0 <= late + 1e-4 <= _SLEEP_TOLERANCE_S else "lies",
        detail=f"a sleep of {sleep_s * 1e3:g} ms took {found * 1e3:.2f} ms",
    )
    resolution = time.get_clock_info("perf_counter").resolution
    yield Check(
        name="clock resolution",
        verdict="ok" if resolution <= 1e-6 else "lies",
        detail=f"{resolution * 1e9:.3g} ns",
    )


def _operations(measurement: Measurement) -> Check:
    found = sum(_values(measurement, "flops"))
    return Check(
        name="operations",
        verdict="ok" if found == _PRODUCT_FLOPS else "lies",
        detail=f"{found:.0f} of {_PRODUCT_FLOPS} floating-point operations of a product",
    )


def _threads(measurement: Measurement, spec: Mapping[str, Any]) -> Check:
    found = measurement.theory.get("threads")
    return Check(
        name="threads",
        verdict="ok" if found == spec["threads"] else "lies",
        detail=f"torch uses {found:.0f} of {spec['threads']} asked for",
    )


def _isolation(runs: Sequence[_Run]) -> Check:
    """Each trial in a process of its own, which costs little."""
    processes = {run.measurement.theory.get("process") for run in runs}
    # The first one imports what the others find imported.
    overhead = statistics.median(run.seconds - run.own_seconds for run in runs[1:])
    good = len(processes) == len(runs) and overhead <= _OVERHEAD_S
    return Check(
        name="isolation",
        verdict="ok" if good else "lies",
        detail=f"{len(processes)} processes for {len(runs)} trials, {overhead:.3f} s beyond the work of each",
    )


def _noise(measurements: Sequence[Measurement]) -> Iterator[Check]:
    """The A/A run: the same work against itself, within a process and from one process to the next."""
    ratios = [
        sign * math.log(a / b)
        for measurement in measurements
        for sign, (a, b) in zip(_signs(), _pairs(_values(measurement, "turn_s")), strict=False)
    ]
    yield Check(name="A/A in turns", verdict="note", detail=_smallest(statistics.stdev(ratios)))
    medians = [math.log(statistics.median(_values(measurement, "turn_s"))) for measurement in measurements]
    spread = statistics.stdev(medians) * math.sqrt(2)
    yield Check(name="A/A of processes", verdict="note", detail=_smallest(spread))
    shares = [share for measurement in measurements for share in _values(measurement, "others_cpu")]
    if shares:
        share = statistics.fmean(shares)
        busy = share > DISTURBED
        words = "; times taken now are doubtful" if busy else ""
        yield Check(
            name="others",
            verdict="note" if busy else "ok",
            detail=f"other processes used {share:.1%} of the CPUs meanwhile{words}",
        )


def _signs() -> Iterator[int]:
    """A B, B A, A B …"""
    while True:
        yield from (1, -1)


def _pairs(turns: Sequence[float]) -> Iterator[tuple[float, float]]:
    return zip(turns[::2], turns[1::2], strict=False)


def _smallest(sd: float) -> str:
    """The smallest difference in speed that so many pairs find in four of five cases."""
    effects = ", ".join(f"{math.expm1(_Z * sd / math.sqrt(n)):.1%} with {n}" for n in _PAIRS)
    return f"a pair differs by {sd:.1%} (sd); smallest difference that can be found: {effects} pairs"


# What is there


def _places(results_dir: Path) -> Iterator[Check]:
    place = next(path for path in (results_dir, *results_dir.absolute().parents) if path.is_dir())
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder:
            write_atomically(Path(folder) / "record.json", "{}")
        free = os.statvfs(place)
        gib = free.f_bavail * free.f_frsize / 2**30
        yield Check(name="results folder", verdict="ok", detail=f"{place} can be written, {gib:.1f} GiB free")
    except OSError as error:
        yield Check(name="results folder", verdict="lies", detail=f"{place}: {error.strerror}")
    with tempfile.TemporaryDirectory() as folder, device_lock("doctor", folder=Path(folder)) as held:
        detail = "timed trials take turns" if held else "no locks here: nothing keeps timed trials apart"
        yield Check(name="locks", verdict="ok" if held else "lies", detail=detail)


def _software(measurement: Measurement) -> Iterator[Check]:
    native = measurement.theory.get("native")
    yield Check(
        name="compiled kernel",
        verdict="note" if native else "ok",
        detail=str(native) if native else "attention.backend=native is there",
    )
    cuda = measurement.theory.get("cuda")
    yield Check(name="CUDA", verdict="ok" if cuda else "note", detail=str(cuda or "no device"))
    for name, module in _LAUNCHERS.items():
        there = _importable(module)
        yield Check(
            name=f"launcher {name}",
            verdict="ok" if there else "note",
            detail="" if there else "not installed",
        )
    for name, found in measurement.theory.items():
        if name.startswith("corpus "):
            wrong = str(found).startswith("! ")
            detail = str(found).removeprefix("! ") if wrong else f"sha256 {str(found)[:12]}…"
            yield Check(name=name, verdict="note" if wrong else "ok", detail=detail)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
