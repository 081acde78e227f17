"""Fingerprint of the code, and what is known of machine and checkout."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from harness import environment, worker_environment
from harness.environment import code_fingerprint, host_environment
from harness.errors import HarnessError

SpecOf = Callable[..., tuple[str, Mapping[str, Any]]]


@pytest.fixture
def copy_of_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small tree in place of the measured code."""
    for name in ("harness/worker.py", "harness/report.py", "harness/probes/time.py", "reformer/a/b.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "harness" / "environment.py"))
    monkeypatch.setattr(environment, "_package_folder", lambda name: tmp_path / name)
    return tmp_path


def test_fingerprint_is_twelve_hex_digits_and_stable() -> None:
    assert code_fingerprint() == code_fingerprint()
    assert len(code_fingerprint()) == 12
    int(code_fingerprint(), 16)


@pytest.mark.parametrize("name", ["harness/worker.py", "harness/probes/time.py", "reformer/a/b.py"])
def test_an_edited_line_of_the_measured_code_is_seen(name: str, copy_of_code: Path) -> None:
    before = code_fingerprint()
    (copy_of_code / name).write_text("x = 2\n")
    assert code_fingerprint() != before


def test_a_new_or_renamed_file_is_seen_and_other_files_are_not(copy_of_code: Path) -> None:
    before = code_fingerprint()
    (copy_of_code / "harness" / "report.py").write_text("x = 2\n")
    (copy_of_code / "reformer" / "notes.txt").write_text("hello")
    assert code_fingerprint() == before
    (copy_of_code / "reformer" / "a" / "b.py").rename(copy_of_code / "reformer" / "a" / "c.py")
    renamed = code_fingerprint()
    assert renamed != before
    (copy_of_code / "reformer" / "kernel.cpp").write_text("int x;")
    assert code_fingerprint() != renamed


def test_code_that_is_not_there_is_told() -> None:
    with pytest.raises(HarnessError, match="'no_such_package' is not installed"):
        environment._package_folder("no_such_package")


def test_host_knows_cores_and_memory() -> None:
    host = host_environment()
    assert host["physical_cores"] >= 1
    assert host["memory_bytes"] > 2**28
    assert {"commit", "dirty"} <= set(host)


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_commit_and_dirty_mark(tmp_path: Path) -> None:
    assert environment._checkout(tmp_path) == {"commit": None, "dirty": None}
    git(tmp_path, "init")
    assert environment._checkout(tmp_path)["commit"] is None
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    clean = environment._checkout(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("2")
    assert environment._checkout(tmp_path) == {"commit": clean["commit"], "dirty": True}


def test_worker_knows_libraries_threads_and_allocator(
    spec_of: SpecOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from harness import codec

    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    known = worker_environment.worker_environment(codec.decode(spec_of()[1]))
    assert known["torch"] == torch.__version__
    assert known["threads"] == torch.get_num_threads()
    assert known["allocator"]["MALLOC_ARENA_MAX"] == "2"
    assert known["cpu_model"] == known["device_name"] != ""
    assert known["backend"] == codec.decode(spec_of()[1]).backend != ""


def test_a_processor_without_a_name_still_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert worker_environment._cpu_model()
