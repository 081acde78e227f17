"""Which devices there are, and what is said when one is missing."""

from __future__ import annotations

import pytest
import torch

from harness import devices


def test_a_cpu_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    devices.check("cpu")


def test_cuda_is_there_if_torch_finds_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices.check("cuda")


@pytest.mark.parametrize(("version", "build"), [(None, "CPU build"), ("12.8", "CUDA 12.8 build")])
def test_cuda_without_a_gpu_is_told_with_the_build_of_torch(
    version: str | None, build: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    with pytest.raises(ValueError, match="device=cuda") as caught:
        devices.check("cuda")
    assert str(caught.value) == (
        f"device=cuda: torch {torch.__version__} ({build}) finds no GPU here; use device=cpu"
    )


@pytest.mark.parametrize("device", ["tpu", "cuda:0", ""])
def test_an_unknown_device_is_told_with_the_known_ones(device: str) -> None:
    with pytest.raises(ValueError, match="device=") as caught:
        devices.check(device)
    assert str(caught.value) == f"device={device!r}: use one of cpu, cuda"


def test_a_dtype_is_torchs_of_that_name() -> None:
    assert {name: getattr(torch, name) for name in devices.DTYPES} == devices.DTYPES
    assert set(devices.DTYPES) == {"float32", "bfloat16", "float16"}
