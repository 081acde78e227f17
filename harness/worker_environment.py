"""What only the measuring process can tell of itself: libraries, threads, processor, allocator."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from harness.environment import available_cpus

if TYPE_CHECKING:
    from harness.spec import TrialSpec

_ALLOCATOR_VARIABLES = ("LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
#: What they begin with: they decide how threads share, wait and are bound.
_THREAD_VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
#: Of a control group, in its second version and in its first.
_LIMITS = {
    "cpu_quota": ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
    "memory_limit": ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
}


def worker_environment(spec: TrialSpec) -> dict[str, Any]:
    """What the measuring process knows about itself; initialises CUDA if the spec asks for it."""
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
        "backend": spec.backend,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_model": _cpu_model(),
        "device_name": _cpu_model(),
        "platform": platform.platform(),
        "allocator": _allocator_settings(),
        "thread_variables": _variables(_THREAD_VARIABLES),
        "cpus": available_cpus(),
        "huge_pages": _chosen(_first_line(_HUGE_PAGES)),
        "governor": _first_line(_GOVERNOR),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{
            name: next(filter(None, map(_first_line, map(Path, paths))), "")
            for name, paths in _LIMITS.items()
        },
    }
    if spec.device.startswith("cuda"):
        environment["device_name"] = torch.cuda.get_device_name(spec.device)
        environment["cuda"] = torch.version.cuda
        environment["cuda_capability"] = ".".join(map(str, torch.cuda.get_device_capability(spec.device)))
    return environment


def _allocator_settings() -> dict[str, str]:
    named = {name: os.environ[name] for name in _ALLOCATOR_VARIABLES if name in os.environ}
    return dict(sorted((named | _variables(("MALLOC_",))).items()))


def _variables(beginnings: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(beginnings)}


def _first_line(path: Path) -> str:
    """Of a file of the kernel; empty where there is none, as in most containers."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()
    except OSError:
        return ""


def _chosen(choices: str) -> str:
    """The one in brackets: `always [madvise] never`."""
    return choices.partition("[")[2].partition("]")[0] or choices


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()
