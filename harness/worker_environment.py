"""What only the measuring process can tell of itself: libraries, threads, processor, allocator."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

if TYPE_CHECKING:
    from harness.spec import TrialSpec

_ALLOCATOR_VARIABLES = ("LD_PRELOAD", "GLIBC_TUNABLES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


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
    }
    if spec.device.startswith("cuda"):
        environment["device_name"] = torch.cuda.get_device_name(spec.device)
        environment["cuda"] = torch.version.cuda
        environment["cuda_capability"] = ".".join(map(str, torch.cuda.get_device_capability(spec.device)))
    return environment


def _allocator_settings() -> dict[str, str]:
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("MALLOC_") or name in _ALLOCATOR_VARIABLES
    }


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
