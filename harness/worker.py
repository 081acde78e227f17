"""The measuring process: imports torch once, then forks one fresh child a trial.

    python -m harness.worker --serve                     the fork server (`harness.protocol`)
    python -m harness.worker < spec.json > record.json   one trial, no server, no parent

The server itself never computes: it touches neither threads nor CUDA, so that every child starts as a
new process would, 10 ms after it was asked for. Standard output carries messages or the record and
nothing else; whatever a trial prints goes to its log (or to standard error).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import gc
import json
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from harness.errors import EXIT_INTERRUPTED, EXIT_USAGE
from harness.factors import REPLICATES
from harness.protocol import OUT_OF_MEMORY, PROGRESS_PREFIX, PROTOCOL, next_message, now
from harness.record import MOST_REPLICATES, Measurement, Outcome, TrialRecord, to_json, trial_id
from harness.store import write_atomically

_PR_SET_PDEATHSIG = 1
_TRACEBACK_LIMIT = 20_000
_PROGRESS_INTERVAL_S = 0.5
_FORECAST_S = 3.0
_NUMBER = re.compile(r"-?[\d.]+(e[-+]?\d+)?")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, or measure the one trial on standard input; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m harness.worker", description="Measure trials.")
    parser.add_argument("--serve", action="store_true", help="answer requests until standard input ends")
    arguments = parser.parse_args(argv)
    # Before torch is imported: the profiler would tell the log of every start and stop.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    replies = _keep_stdout()
    if arguments.serve:
        _serve(replies)
        return 0
    try:
        return _measure_once(sys.stdin.read(), replies)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def measure(
    data: Mapping[str, Any],
    *,
    memory_limit_gib: float | None = None,
    weights: Path | None = None,
    progress: Callable[[str], None],
) -> Measurement:
    """Run the workload of a spec in this process; failing is an outcome, never an exception.

    Args:
        data: the encoded spec.
        memory_limit_gib: how much the address space may grow; ignored with CUDA, which maps far more
            than it uses.
        weights: where trained weights are kept, if the spec asks for it.
        progress: told how far the trial is.
    """
    import torch

    from harness import codec
    from harness.worker_environment import worker_environment

    environment: dict[str, Any] = {}
    try:
        spec = codec.decode(data)
        torch.set_num_threads(spec.threads)
        environment = worker_environment(spec)
        with _memory_limit(None if spec.device.startswith("cuda") else memory_limit_gib):
            if spec.train.save_weights and weights is not None:
                measurement = spec.workload.keeping(spec, progress=progress, weights=weights)
            else:
                measurement = spec.workload(spec, progress=progress)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Measurement(outcome=outcome_of(error), environment=environment)
    return dataclasses.replace(measurement, environment={**environment, **measurement.environment})


def outcome_of(error: BaseException) -> Outcome:
    """The outcome that an exception of a workload stands for."""
    text = "".join(traceback.format_exception(error))[-_TRACEBACK_LIMIT:]
    message = _one_line(error)
    place = _memory_that_ran_out(error)
    if place:
        return Outcome(status="out_of_memory", message=f"{place}: {message}", traceback=text)
    return Outcome(status="error", message=message, traceback=text)


def _memory_that_ran_out(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "cpu"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return "cuda"
    if isinstance(error, (RuntimeError, OSError)) and OUT_OF_MEMORY.search(str(error)):
        return "cuda" if "cuda" in str(error).lower() else "cpu"
    return ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


# The fork server


def _serve(replies: TextIO) -> None:
    """Answer requests until the parent closes its end, or dies, which closes it too."""
    import harness.codec
    import harness.worker_environment  # noqa: F401  (both are imported once here, inherited by every child)
    import reformer.kernels.native

    requests = _Requests(sys.stdin.fileno())
    _send(replies, {"protocol": PROTOCOL, "harness": str(Path(__file__).parent)})
    while (request := requests.next()) is not None:
        if request["op"] == "decode":
            results = _decode_all(request["configs"], request.get("check_device", False))
            if request.get("forecast"):
                _add_forecasts(results, within_s=_FORECAST_S)
            _send(replies, {"results": results})
        elif request["op"] == "run":
            # Compiled here, if nobody has yet, and not within what the first trial measures.
            reformer.kernels.native.missing()
            _run(request, requests, replies)
        else:
            _send(replies, {"error": f"unknown request {request['op']!r}"})


class _Requests:
    """Lines from a pipe, read without Python's buffering so that `select` tells the truth."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._buffer = bytearray()

    def next(self) -> dict[str, Any] | None:
        """The next request, None once the pipe has ended."""
        return next_message(self._buffer, self.read_more)

    def read_more(self) -> bool:
        """Take what the pipe holds; False once it has ended."""
        data = os.read(self.descriptor, 1 << 16)
        self._buffer += data
        return bool(data)


def _decode_all(configs: Sequence[Mapping[str, Any]], check_device: bool) -> list[dict[str, Any]]:
    results = _decode_settings(configs)
    if check_device:
        faults = _device_faults({result["spec"]["device"] for result in results if "spec" in result})
        for index, (config, result) in enumerate(zip(configs, results, strict=True)):
            fault = faults.get(result["spec"]["device"]) if "spec" in result else None
            if fault:
                results[index] = {"error": fault, "trial_id": trial_id(config)}
    return results


def _decode_settings(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Decode each config; those that differ in what replicates a trial alone, once."""
    results: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}
    for config in configs:
        counts = {name: config.get(name) for name in REPLICATES}
        if not all(type(count) is int and 0 <= count < MOST_REPLICATES for count in counts.values()):
            results.append(_decode_one(config))
            continue
        setting = _setting(config)
        key = json.dumps(setting, sort_keys=True, default=repr)
        if key not in known:
            known[key] = _decode_one(setting)
        result = known[key]
        if "spec" not in result:
            results.append({**result, "trial_id": trial_id(config)})
            continue
        spec = {**result["spec"], **counts}
        results.append({**result, "spec": spec, "trial_id": trial_id(spec)})
    return results


def _setting(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The first replicate of a trial: it costs as much, and is valid, as all others are."""
    return {**spec, **dict.fromkeys(REPLICATES, 0)}


def _decode_one(config: Mapping[str, Any]) -> dict[str, Any]:
    from harness import codec

    try:
        spec = codec.decode(config)
        encoded = codec.encode(spec)
        return {
            "spec": encoded,
            "trial_id": trial_id(encoded),
            "backend": spec.backend,
            "timed": spec.workload.timed,
        }
    except ValueError as error:
        return {"error": " ".join(str(error).split()), "trial_id": trial_id(config)}
    except Exception as error:
        traceback.print_exc()
        return {"error": _one_line(error), "trial_id": trial_id(config)}


def _add_forecasts(results: Sequence[dict[str, Any]], *, within_s: float) -> None:
    """What valid trials will cost; a sweep too large to be told within that time is told in part."""
    from harness import codec

    until = time.monotonic() + within_s
    known: dict[str, dict[str, float] | None] = {}
    for result in results:
        if "spec" not in result or time.monotonic() > until:
            continue
        setting = _setting(result["spec"])
        key = trial_id(setting)
        if key not in known:
            spec = codec.decode(setting)
            forecast = spec.workload.forecast(spec)
            known[key] = None if forecast is None else dataclasses.asdict(forecast)
        if known[key] is not None:
            result["forecast"] = known[key]


def _device_faults(devices: set[str]) -> dict[str, str]:
    """What is wrong with each device that cannot be used here.

    Asking CUDA how many devices there are initialises it, and a child of a process that has done so
    cannot use it; so the question is asked in a child of its own.
    """
    reader, writer = os.pipe()
    pid = _fork()
    if pid == 0:
        os.close(reader)
        _tell_device_faults(devices, writer)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    os.waitpid(pid, 0)
    answer: dict[str, str] = json.loads(text or "{}")
    return answer


def _tell_device_faults(devices: set[str], writer: int) -> NoReturn:
    from harness import devices as known

    faults = {}
    for device in devices:
        try:
            known.check(device)
        except Exception as error:
            faults[device] = " ".join(str(error).split())
    os.write(writer, json.dumps(faults).encode())
    os._exit(0)


@functools.cache
def _import_ahead() -> None:
    """Import what every trial would import for itself, 1.3 s of it behind the first optimizer."""
    import torch._dynamo  # noqa: F401

    import harness.workloads.measure  # noqa: F401

    # A child that collects garbage need not go through all of this, nor copy its pages.
    gc.collect()
    gc.freeze()


def _run(request: Mapping[str, Any], requests: _Requests, replies: TextIO) -> None:
    _import_ahead()
    before = _oom_kills()
    server = os.getpid()
    pid = _fork()
    if pid == 0:
        replies.close()
        _run_child(request, server)
    with contextlib.suppress(OSError):
        # Here and in the child: whoever comes first, the group is there before anybody needs it.
        os.setpgid(pid, pid)
    _send(replies, {"pid": pid})
    if not _wait_for(pid, requests.descriptor, requests.read_more):
        _kill_group(pid)
        os.waitpid(pid, 0)
        os._exit(1)
    # Whatever the trial started goes with it; the zombie keeps the group's number from being reused.
    _kill_group(pid)
    _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    _send(
        replies,
        {
            "exit": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "oom_kill": _oom_kills() > before,
        },
    )


def _wait_for(pid: int, pipe: int, read_more: Callable[[], bool]) -> bool:
    """Block until the child has ended; False if the parent went away first."""
    descriptor = os.pidfd_open(pid)
    try:
        while True:
            ready, _, _ = select.select([descriptor, pipe], [], [])
            if descriptor in ready:
                return True
            if not read_more():
                return False
    finally:
        os.close(descriptor)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _fork() -> int:
    with warnings.catch_warnings():
        # Python 3.12 warns when other threads exist: numpy's OpenBLAS has some, which survive a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        sys.stdout.flush()
        sys.stderr.flush()
        return os.fork()


def _run_child(request: Mapping[str, Any], server: int) -> NoReturn:
    """Measure in the forked child and leave without running the server's exit handlers."""
    code = 1
    try:
        _become_trial(request["log"], server)
        measurement = measure(
            request["spec"],
            memory_limit_gib=request.get("memory_limit_gib"),
            weights=Path(request["weights"]) if request.get("weights") else None,
            progress=_progress_printer(),
        )
        write_atomically(Path(request["out"]), to_json(measurement))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _become_trial(log: str, server: int) -> None:
    # Its own group, so that what the trial starts can be ended with it.
    os.setpgid(0, 0)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != server:
        os._exit(1)  # the server went away before it could be tied to this process
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    faulthandler.enable(file=2)


def _progress_printer() -> Callable[[str], None]:
    """Prints now and then, and always when something else begins than what the last line was about."""
    last, about = -_PROGRESS_INTERVAL_S, ""

    def print_progress(message: str) -> None:
        nonlocal last, about
        line = " ".join(message.split())
        moment, subject = time.monotonic(), _NUMBER.sub("", line)
        if subject != about or moment - last >= _PROGRESS_INTERVAL_S:
            last, about = moment, subject
            print(f"{PROGRESS_PREFIX}{line}", flush=True)

    return print_progress


# One trial without a server


def _measure_once(text: str, stdout: TextIO) -> int:
    """Measure the trial described by `text` and write its whole record."""
    from harness.environment import code_fingerprint

    try:
        request = json.loads(text)
        if not isinstance(request, dict):
            raise ValueError("not a JSON object")
    except ValueError as error:
        print(f"harness: standard input is no trial: {error}", file=sys.stderr)
        return EXIT_USAGE
    if "spec" not in request:
        request = {"spec": request}
    started_at, start = now(), time.monotonic()
    decoded = _decode_one(request["spec"])
    if "error" in decoded:
        measurement = Measurement(outcome=Outcome(status="invalid", message=decoded["error"]))
    else:
        measurement = measure(
            decoded["spec"],
            memory_limit_gib=request.get("memory_limit_gib"),
            weights=Path(f"{decoded['trial_id']}.safetensors"),
            progress=_progress_printer(),
        )
    record = TrialRecord(
        trial_id=decoded["trial_id"],
        experiment=request.get("experiment", "default"),
        cell=request.get("cell", {}),
        code=code_fingerprint(),
        spec=decoded.get("spec") or request["spec"],
        outcome=measurement.outcome,
        environment=measurement.environment,
        samples=measurement.samples,
        series=measurement.series,
        theory=measurement.theory,
        started_at=started_at,
        duration_s=time.monotonic() - start,
    )
    stdout.write(to_json(record) + "\n")
    stdout.flush()
    return 0


# Operating system


def _keep_stdout() -> TextIO:
    """Standard output for messages alone: what anybody else prints goes to standard error."""
    sys.stdout.flush()
    kept = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return kept


def _send(replies: TextIO, message: Mapping[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


@contextlib.contextmanager
def _memory_limit(gib: float | None) -> Iterator[None]:
    """Let the address space grow by so much; lifted before a failure is looked at, which needs memory."""
    if gib is None:
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + int(gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _oom_kills() -> int:
    """How often the kernel has killed a process of this control group for want of memory."""
    for path in _memory_event_files():
        try:
            for line in path.read_text().splitlines():
                name, _, count = line.partition(" ")
                if name == "oom_kill":
                    return int(count)
        except (OSError, ValueError):
            continue
    return 0


def _memory_event_files() -> Iterator[Path]:
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = "/sys/fs/cgroup", "memory.events"
        elif "memory" in controllers.split(","):
            root, name = "/sys/fs/cgroup/memory", "memory.oom_control"
        else:
            continue
        # In a container the group's own path is often not visible, but its root is.
        yield Path(root + path) / name
        yield Path(root) / name


if __name__ == "__main__":
    sys.exit(main())
