"""The measuring process, without the parent's client: one-shot mode, the raw protocol, what outcomes mean."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import worker
from harness.record import from_json, trial_id
from tests.harness.conftest import gone, harness_environment
from tests.harness.specs import plain_spec

SpecOf = Callable[..., tuple[str, Mapping[str, Any]]]
WORKER = [sys.executable, "-P", "-m", "harness.worker"]


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (MemoryError(), "out_of_memory", "cpu: MemoryError"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "out_of_memory",
            "cpu: RuntimeError: Def",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you"), "out_of_memory", "cpu: "),
        (RuntimeError("std::bad_alloc"), "out_of_memory", "cpu: "),
        (OSError(12, "Cannot allocate memory"), "out_of_memory", "cpu: "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out_of_memory", "cuda: OutOfMemoryError"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory", "cuda: "),
        (ValueError("out of memory is what I say"), "error", "ValueError: out of memory"),
        (RuntimeError("a\nb"), "error", "RuntimeError: a b"),
        (SystemExit(3), "error", "SystemExit: 3"),
        (AssertionError(), "error", "AssertionError"),
    ],
)
def test_outcome_of_an_exception(error: BaseException, status: str, message: str) -> None:
    outcome = worker.outcome_of(error)
    assert outcome.status == status
    assert outcome.message.startswith(message)
    assert type(error).__name__ in outcome.traceback


def test_measure_tells_where_it_failed(spec_of: SpecOf) -> None:
    _, spec = spec_of(does="raise")
    measurement = worker.measure(spec, progress=silent)
    assert measurement.outcome.status == "error"
    assert "in _raise" in measurement.outcome.traceback
    assert measurement.environment["threads"] == 1


def test_measure_refuses_memory_beyond_the_limit_and_lifts_it_again(spec_of: SpecOf) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    _, spec = spec_of(does="allocate_until_refused")
    measurement = worker.measure(spec, memory_limit_gib=0.25, progress=silent)
    assert measurement.outcome.status == "out_of_memory"
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_one_shot_prints_nothing_but_the_record(spec_of: SpecOf) -> None:
    trial_id, spec = spec_of(does="print_garbage")
    request = json.dumps({"spec": spec, "trial_id": trial_id, "cell": {"seed": "0"}, "experiment": "mine"})
    result = subprocess.run(
        WORKER,
        input=request,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=harness_environment(),
    )
    record = from_json(result.stdout)
    assert result.returncode == 0
    assert (record.trial_id, record.experiment, record.cell) == (trial_id, "mine", {"seed": "0"})
    assert record.outcome.status == "ok"
    assert record.values("step_s") == (0.5, 0.5)
    assert "and this on stderr" in result.stderr
    assert "no JSON" in result.stderr


def test_one_shot_records_an_invalid_spec(spec_of: SpecOf) -> None:
    _, spec = spec_of()
    result = subprocess.run(
        WORKER,
        input=json.dumps({**spec, "threads": 0}),
        capture_output=True,
        text=True,
        env=harness_environment(),
    )
    record = from_json(result.stdout)
    assert record.outcome.status == "invalid"
    assert "threads" in record.outcome.message


@pytest.mark.parametrize("text", ["", "nonsense", "[1]"])
def test_one_shot_refuses_what_is_no_trial(text: str) -> None:
    result = subprocess.run(WORKER, input=text, capture_output=True, text=True, env=harness_environment())
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("harness: standard input is no trial")


def test_one_shot_can_be_interrupted(spec_of: SpecOf) -> None:
    _, spec = spec_of(seconds=60.0)
    with subprocess.Popen(
        WORKER,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=harness_environment(),
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(json.dumps(spec))
        process.stdin.close()
        assert process.stderr.readline().startswith("progress: ")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout is not None
        assert process.stdout.read() == ""


@pytest.fixture
def raw_server() -> Iterator[subprocess.Popen[str]]:
    """A fork server whose pipes the test holds itself."""
    process = subprocess.Popen(
        [*WORKER, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=harness_environment(),
    )
    with process:
        yield process
        process.kill()


def ask(server: subprocess.Popen[str], request: Mapping[str, Any] | None = None) -> dict[str, Any]:
    assert server.stdin is not None
    assert server.stdout is not None
    if request is not None:
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
    reply: dict[str, Any] = json.loads(server.stdout.readline())
    return reply


def start_sleeping(server: subprocess.Popen[str], spec: Mapping[str, Any], folder: Path) -> int:
    request = {"op": "run", "spec": spec, "out": str(folder / "out"), "log": str(folder / "log")}
    pid: int = ask(server, request)["pid"]
    wait_until(lambda: "progress: " in log_of(folder))
    return pid


def log_of(folder: Path) -> str:
    path = folder / "log"
    return path.read_text() if path.exists() else ""


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_server_greets_and_answers_what_it_does_not_know(raw_server: subprocess.Popen[str]) -> None:
    greeting = ask(raw_server)
    assert greeting["protocol"] == 1
    assert Path(greeting["harness"]) == Path(worker.__file__).parent
    assert "unknown request" in ask(raw_server, {"op": "dance"})["error"]


def test_server_ends_with_its_pipe_and_takes_the_trial_along(
    raw_server: subprocess.Popen[str], spec_of: SpecOf, tmp_path: Path
) -> None:
    ask(raw_server)
    pid = start_sleeping(raw_server, spec_of(seconds=60.0)[1], tmp_path)
    assert raw_server.stdin is not None
    raw_server.stdin.close()
    wait_until(lambda: gone(pid))
    assert raw_server.wait(10) == 1


def test_trial_dies_with_a_server_that_is_killed(
    raw_server: subprocess.Popen[str], spec_of: SpecOf, tmp_path: Path
) -> None:
    ask(raw_server)
    pid = start_sleeping(raw_server, spec_of(seconds=60.0)[1], tmp_path)
    raw_server.send_signal(signal.SIGKILL)
    wait_until(lambda: gone(pid))


def test_server_imports_neither_hydra_nor_the_reading_side(spec_of: SpecOf) -> None:
    _, spec = spec_of()
    forbidden = ["hydra", "omegaconf", "pandas", "seaborn", "matplotlib", "psutil"]
    code = (
        "import json, sys\n"
        "from harness import worker\n"
        "worker.measure(json.load(sys.stdin), progress=print)\n"
        f"print('loaded', [name for name in {forbidden} if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(spec),
        capture_output=True,
        text=True,
        env=harness_environment(),
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "loaded []"


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (["low 0\nhigh 3\noom 2\noom_kill 5\n"], 5),
        (["oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"], 2),
        ([None, "oom_kill 7\n"], 7),
        (["oom 1\n"], 0),
        (["oom_kill many\n", None], 0),
    ],
)
def test_oom_kills_are_read_from_the_first_file_that_tells(
    texts: list[str | None], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / str(index) for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        if text is not None:
            path.write_text(text)
    monkeypatch.setattr(worker, "_memory_event_files", lambda: iter(paths))
    assert worker._oom_kills() == count


def test_memory_event_files_belong_to_this_control_group() -> None:
    paths = list(worker._memory_event_files())
    assert all(path.name in ("memory.events", "memory.oom_control") for path in paths)


def test_progress_is_one_line_and_not_too_often(capsys: pytest.CaptureFixture[str]) -> None:
    progress = worker._progress_printer()
    progress("step 1\nof 2")
    progress("step 2 of 2")
    assert capsys.readouterr().out == "progress: step 1 of 2\n"


def test_progress_on_something_else_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    progress = worker._progress_printer()
    for line in ("step 1/2 loss 0.25", "step 2/2 loss 3e-05", "measuring memory", "measuring the allocator"):
        progress(line)
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "progress: step 1/2 loss 0.25",
        "progress: measuring memory",
        "progress: measuring the allocator",
    ]


BARE_NODE = """
import runpy, sys
absent = set("hydra omegaconf hydra_plugins psutil scipy seaborn matplotlib pyarrow jinja2".split())
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
sys.argv = ["worker"]
runpy.run_module("harness.worker", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "workload",
    [
        {"_target_": "harness.workloads.train.Train"},
        {"_target_": "harness.workloads.train_step.TrainStep", "timed_steps": 1},
        {"_target_": "harness.workloads.forward.Forward", "timed_steps": 1},
        {"_target_": "harness.workloads.decode.Decode", "new_tokens": 2, "warmup_tokens": 1},
        {"_target_": "harness.workloads.attention.Attention", "timed_steps": 1},
        {"_target_": "harness.workloads.hashing.Hashing", "draws": 100},
        {"_target_": "harness.workloads.self_test.SelfTest", "mebibytes": 2},
    ],
    ids=lambda workload: workload["_target_"].rpartition(".")[2],
)
def test_a_node_with_torch_numpy_and_jaxtyping_measures(workload: dict[str, Any]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE_NODE],
        input=json.dumps(plain_spec(workload=workload)),
        capture_output=True,
        text=True,
        env=harness_environment(),
    )
    assert done.returncode == 0, done.stderr
    record = from_json(done.stdout)
    assert record.outcome.status == "ok", record.outcome
    assert record.trial_id == trial_id(record.spec)
