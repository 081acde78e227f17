"""What a measurement depends on besides its spec, as far as one can tell without torch.

The measured code has a fingerprint, read from its files without importing them; the machine and the
checkout are looked at through psutil and git. What only the measuring process can tell is in
`harness.worker_environment`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import HarnessError

#: The part of the harness that runs in the measuring process and so can change what is measured.
MEASURED_MODULES = ("worker", "codec", "spec", "devices", "forecast")
MEASURED_PACKAGES = ("tasks", "workloads", "probes", "peers")

_SOURCES = frozenset({".py", ".cpp", ".h", ".cu", ".cuh"})


def code_fingerprint() -> str:
    """First 12 hex digits of sha256 over the measured code, read without importing it.

    Raises:
        HarnessError: `reformer` is not installed.
    """
    digest = hashlib.sha256()
    for name, path in _measured_files():
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def _measured_files() -> Iterator[tuple[str, Path]]:
    harness = Path(__file__).parent
    yield from _sources_under(_package_folder("reformer"), "reformer")
    for module in MEASURED_MODULES:
        path = harness / f"{module}.py"
        if path.exists():
            yield f"harness/{path.name}", path
    for package in MEASURED_PACKAGES:
        yield from _sources_under(harness / package, f"harness/{package}")


def _sources_under(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in _SOURCES and path.is_file():
            yield f"{name}/{path.relative_to(folder).as_posix()}", path


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise HarnessError(f"the package {name!r} is not installed: pip install -e . in the checkout")
    return Path(next(iter(spec.submodule_search_locations)))


def available_cpus() -> int:
    """CPUs that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def host_environment() -> dict[str, Any]:
    """What the parent knows about the machine and the checkout; asked once a process."""
    import psutil

    return {
        "physical_cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        **_checkout(Path(__file__).parent.parent),
    }


def _checkout(root: Path) -> dict[str, Any]:
    """The commit that the code was checked out from, if it was."""
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit or None, "dirty": None if changes is None else bool(changes)}


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), *arguments]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
