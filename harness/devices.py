"""Devices and number types of a trial, and whether a device is there."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

DEVICES = ("cpu", "cuda")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device: str, dtype: str) -> AbstractContextManager[object]:
    """What a forward pass runs under: nothing for float32."""
    return torch.autocast(device, dtype=DTYPES[dtype], enabled=dtype != "float32")


def check(device: str) -> None:
    """Refuse a device that this machine lacks; creates no CUDA context, so a fork may follow.

    Raises:
        ValueError: an unknown device, or CUDA without a GPU.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r}: use one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        raise ValueError(
            f"device=cuda: torch {torch.__version__} ({build} build) finds no GPU here; use device=cpu"
        )
