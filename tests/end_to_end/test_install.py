"""However it is installed and wherever one stands, the harness finds its config and Hydra's launchers."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import ROOT

KINDS = ("checkout", "editable", "wheel")


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An environment with the harness in it.

    Args:
        command: what `harness` is there.
        paths: for PYTHONPATH.
        conf: the folder that the config must come from.
    """

    command: tuple[str, ...]
    conf: Path
    paths: str = ""

    def __call__(self, *words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        if self.paths:
            environment["PYTHONPATH"] = self.paths
        return subprocess.run(
            [*self.command, *map(str, words)],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module", params=KINDS)
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The harness installed in one of the ways there are; what it depends on is this environment's."""
    if request.param == "checkout":
        return Installed(command=(sys.executable, "-m", "harness"), paths=str(ROOT), conf=ROOT / "conf")
    folder = tmp_path_factory.mktemp(request.param) / "venv"
    venv.create(folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # As a bare path the folder adds its packages, but not what is installed there as editable.
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    source = [str(ROOT)] if request.param == "wheel" else ["--editable", str(ROOT)]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-index", "--no-build-isolation", *source], check=True, capture_output=True
    )
    conf = packages / "harness" / "conf" if request.param == "wheel" else ROOT / "conf"
    return Installed(command=(str(folder / "bin" / "harness"),), conf=conf)


def test_the_config_is_found_from_anywhere(installed: Installed, tmp_path: Path) -> None:
    listed = installed("list", "experiments", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    assert {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")} <= set(listed.stdout.split())
    search = installed("run", "--info", "searchpath", cwd=tmp_path)
    assert str(installed.conf) in search.stdout, search.stdout + search.stderr


def test_a_sweep_runs_through_the_joblib_launcher(installed: Installed, tmp_path: Path) -> None:
    done = installed(
        "run",
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "workload=train_step",
        "workload.timed_steps=1",
        "task.length=32",
        "train.batch_size=2",
        "threads=1",
        "seed=0,1",
        "study=both",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 trials" in done.stdout
    assert (tmp_path / "results" / "both" / "report" / "report.html").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results"]
