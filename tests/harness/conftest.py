"""The command line in this process, with a workload that measures nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from harness import cli
from harness.record import TrialRecord
from harness.server import ForkServer, process_server
from harness.store import Study

#: Where `workload=fake` and the experiments `fake_sweep` and `fake_seeds` are.
FAKE_CONF = Path(__file__).parent / "conf"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on standard error."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        return lines[0]


@dataclass(frozen=True)
class Shell:
    """Types commands in an empty folder."""

    folder: Path
    run: Callable[..., Result]

    def __call__(self, *argv: object) -> Result:
        return self.run(*argv)

    def fake(self, command: str, *argv: object) -> Result:
        """`harness run` or `plan` with the fake workload."""
        return self.run(command, "-cd", FAKE_CONF, "workload=fake", *argv)

    def study(self, name: str = "default") -> Study:
        return Study(self.folder / "results" / name)

    def records(self, name: str = "default") -> list[TrialRecord]:
        records, unreadable = self.study(name).scan()
        assert not unreadable
        return records

    def statuses(self, name: str = "default") -> list[str]:
        return sorted(record.outcome.status for record in self.records(name))


@pytest.fixture(scope="session", autouse=True)
def _quiet_children() -> Iterator[None]:
    """Lets the measuring process import the fakes, and keeps it on one thread."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARNESS_ALLOW_TARGETS", "tests.")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
        process_server().close()


@pytest.fixture
def bare_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    """A shell in an empty folder; the report is left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.report.build", lambda study: study / "report" / "report.html")

    def run(*argv: object) -> Result:
        code = cli.main([str(word) for word in argv])
        captured = capsys.readouterr()
        return Result(code=code, out=captured.out, err=captured.err)

    return Shell(tmp_path, run)


@pytest.fixture
def fresh_shell(bare_shell: Shell) -> Shell:
    """A shell whose commands start and end a measuring process each, as they do outside the tests."""
    process_server().close()
    return bare_shell


@pytest.fixture
def shell(bare_shell: Shell, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell whose commands share one measuring process, which saves importing torch each time."""
    monkeypatch.setattr(ForkServer, "close", lambda self: None)
    return bare_shell


@pytest.fixture
def server() -> Iterator[ForkServer]:
    """A fork server of its own."""
    with ForkServer() as one:
        yield one


@pytest.fixture(scope="session")
def shared_server() -> Iterator[ForkServer]:
    """A fork server for tests that do it no harm."""
    with ForkServer() as one:
        yield one


@pytest.fixture(scope="session")
def fake_config(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """The composed config of a trial with the fake workload, as plain data."""
    from hydra.types import RunMode

    from harness.cli import _hydra, _parse
    from hydra_plugins.harness_sweeper._sweeper import _without_hydra, plain_config

    options = _parse(["-cd", str(FAKE_CONF), "workload=fake", "threads=1"], command="run")
    with _hydra(options) as hydra:
        return plain_config(_without_hydra(hydra.compose_config("config", options.overrides, RunMode.RUN)))


@pytest.fixture
def spec_of(
    fake_config: Mapping[str, Any], shared_server: ForkServer
) -> Callable[..., tuple[str, Mapping[str, Any]]]:
    """Decodes the fake config with other values for the workload: id and encoded spec."""

    def decode(**workload: Any) -> tuple[str, Mapping[str, Any]]:
        config = {**fake_config, "workload": {**fake_config["workload"], **workload}}
        (decoded,) = shared_server.decode([config], check_device=False)
        assert decoded.spec is not None, decoded.error
        return decoded.trial_id, decoded.spec

    return decode


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def harness_environment() -> dict[str, str]:
    """The environment of a command in a process of its own: it imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parent.parent)}
