"""The parent's end of the fork server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import server as server_module
from harness.environment import code_fingerprint
from harness.record import measurement_from_json
from harness.server import ForkServer, ServerError
from tests.harness.conftest import gone

SpecOf = Callable[..., tuple[str, Mapping[str, Any]]]


def run(server: ForkServer, spec: Mapping[str, Any], folder: Path, **limits: float) -> server_module.Ending:
    return server.run(spec, out=folder / "out.json", log=folder / "log", **limits)


def environment_after(server: ForkServer, spec: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    assert run(server, spec, folder).exit == 0
    return measurement_from_json((folder / "out.json").read_text()).environment


def test_decode_gives_spec_and_id_or_one_line(
    shared_server: ForkServer, fake_config: Mapping[str, Any]
) -> None:
    odd = {**fake_config, "model": {**fake_config["model"], "d_model": 30}}
    unknown = {**fake_config, "sede": 1}
    good, bad, worse = shared_server.decode([fake_config, odd, unknown], check_device=False)
    assert good.spec is not None
    assert good.error == ""
    assert bad.spec is None
    assert "d_model=30" in bad.error
    assert "seed" in worse.error
    assert len({good.trial_id, bad.trial_id, worse.trial_id}) == 3


def test_decode_of_an_encoded_spec_is_the_same_trial(shared_server: ForkServer, spec_of: SpecOf) -> None:
    trial_id, spec = spec_of()
    (again,) = shared_server.decode([spec], check_device=False)
    assert (again.trial_id, again.spec) == (trial_id, spec)


def test_decode_checks_the_device_only_when_asked(
    shared_server: ForkServer, fake_config: Mapping[str, Any], cuda_is_here: bool
) -> None:
    config = {**fake_config, "device": "cuda"}
    (trusting,) = shared_server.decode([config], check_device=False)
    (checking,) = shared_server.decode([config], check_device=True)
    assert trusting.spec is not None
    assert (checking.spec is not None) == cuda_is_here
    assert ("cuda" in checking.error) != cuda_is_here


@pytest.fixture
def cuda_is_here() -> bool:
    import torch

    return torch.cuda.is_available()


def test_each_trial_is_a_fresh_child_of_one_server(
    shared_server: ForkServer, spec_of: SpecOf, tmp_path: Path
) -> None:
    _, spec = spec_of()
    first, second = (environment_after(shared_server, spec, tmp_path) for _ in range(2))
    assert first["pid"] != second["pid"]
    assert first["parent"] == second["parent"] != os.getpid()


def test_a_trial_costs_little_over_its_own_work(
    shared_server: ForkServer, spec_of: SpecOf, tmp_path: Path
) -> None:
    _, spec = spec_of()
    times = []
    for _ in range(5):
        start = time.monotonic()
        run(shared_server, spec, tmp_path)
        times.append(time.monotonic() - start)
    assert min(times) < 0.1


def test_a_new_block_gets_a_new_server(server: ForkServer, spec_of: SpecOf, tmp_path: Path) -> None:
    _, spec = spec_of()
    server.for_block("seed=0")
    parents, ids = [], []
    for block in ("seed=0", "seed=1", "seed=1"):
        server.for_block(block)
        parents.append(environment_after(server, spec, tmp_path)["parent"])
        ids.append(server.id)
    assert parents[0] != parents[1] == parents[2]
    assert ids[0] != ids[1] == ids[2]
    assert server.code == code_fingerprint()


def test_timeout_kills_and_tells_what_was_held(
    shared_server: ForkServer, spec_of: SpecOf, tmp_path: Path
) -> None:
    _, spec = spec_of(seconds=30.0, mebibytes=64)
    start = time.monotonic()
    ending = run(shared_server, spec, tmp_path, timeout_s=0.7)
    assert time.monotonic() - start < 5
    assert ending.timed_out
    assert ending.signal == signal.SIGKILL
    assert ending.last_rss_bytes is not None
    assert ending.last_rss_bytes > 64 << 20


def test_what_a_trial_leaves_behind_is_ended_with_it(
    shared_server: ForkServer, spec_of: SpecOf, tmp_path: Path
) -> None:
    _, spec = spec_of(does="leave_a_process_behind")
    assert run(shared_server, spec, tmp_path).exit == 0
    left = int((tmp_path / "log").read_text().split("left ")[1].split()[0])
    deadline = time.monotonic() + 5
    while not gone(left) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(left)


def test_a_server_that_dies_is_an_error_and_the_next_trial_gets_another(
    server: ForkServer, spec_of: SpecOf, tmp_path: Path
) -> None:
    with pytest.raises(ServerError, match="SIGKILL") as caught:
        run(server, spec_of(does="kill_the_server")[1], tmp_path)
    assert caught.value.signal == signal.SIGKILL
    assert run(server, spec_of()[1], tmp_path).exit == 0


def test_closing_ends_the_trial_that_runs(server: ForkServer, spec_of: SpecOf, tmp_path: Path) -> None:
    environment = environment_after(server, spec_of()[1], tmp_path)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run(server, spec_of(seconds=30.0)[1], tmp_path)
    timer.join()
    assert gone(environment["parent"])


def test_a_server_that_cannot_import_says_why(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this torch is broken')")
    variables = {**server_module._server_variables()}
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), variables["PYTHONPATH"]])
    monkeypatch.setattr(server_module, "_server_variables", lambda: variables)
    with pytest.raises(ServerError, match=r"ended by itself .*ImportError: this torch is broken"):
        server.decode([{}], check_device=False)


def test_another_protocol_is_refused(server: ForkServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "PROTOCOL", 2)
    with pytest.raises(ServerError, match="another protocol than 2"):
        server.decode([{}], check_device=False)


def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for name in (
        f"harness-of-{ended.pid}-abc",
        f"harness-of-{os.getpid()}-abc",
        "harness-of-nobody-abc",
        "other",
    ):
        (tmp_path / name).mkdir()
    with ForkServer() as server:
        assert server.scratch().name.startswith(f"harness-of-{os.getpid()}-")
    assert {path.name for path in tmp_path.iterdir()} == {
        f"harness-of-{os.getpid()}-abc",
        "harness-of-nobody-abc",
        "other",
    }


def test_closing_twice_and_unused_is_fine() -> None:
    unused = ForkServer()
    unused.close()
    unused.close()
