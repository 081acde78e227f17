"""Commands in processes of their own, of this checkout and of edited copies of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """A copy of the sources, and the folder in which its commands are typed."""

    root: Path
    cwd: Path

    def harness(self, *words: object) -> Done:
        """Type `harness …` as this checkout has it."""
        environment = {**os.environ, "PYTHONPATH": str(self.root)}
        # The threads of a trial are its spec's business.
        environment.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(
            [sys.executable, "-m", "harness", *map(str, words)],
            cwd=self.cwd,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return Done(code=done.returncode, out=done.stdout, err=done.stderr)

    def edit(self, path: str, old: str, new: str) -> None:
        """Change the one place of a file that has this text."""
        file = self.root / path
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path} has {text.count(old)} places like {old!r}"
        file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    """This checkout; its commands are typed somewhere else."""
    return Checkout(root=ROOT, cwd=tmp_path_factory.mktemp("shell"))


@pytest.fixture
def copied(tmp_path: Path) -> Checkout:
    """A copy that a test may edit."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("conf", "harness", "hydra_plugins", "reformer"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    cwd = tmp_path / "shell"
    cwd.mkdir()
    return Checkout(root=root, cwd=cwd)
