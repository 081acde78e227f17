"""The benchmark of a GPU at sizes that a CPU does in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.benchmarks import cuda_attention

pytestmark = pytest.mark.filterwarnings("ignore")
TINY = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--n-heads",
    "2",
    "--head-width",
    "8",
    "--chunk-length",
    "16",
]


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    out = tmp_path / "records.jsonl"
    cuda_attention.main([*TINY, "--turns", "2", "--out", str(out), *arguments])
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_every_cell_has_a_record_and_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["ours, auto", "ours, reference", cuda_attention.FULL]
    options = ["--lengths", "64", "32", "--n-hashes", "1", "2", "--peak-tflops", "1", "--layers", *layers]
    records = run(tmp_path, *options)
    assert [record["length"] for record in records] == [32] * 5 + [64] * 5
    assert {(record["layer"], record["n_hashes"]) for record in records} == {
        *((layer, rounds) for layer in layers[:2] for rounds in (1, 2)),
        (cuda_attention.FULL, None),
    }
    assert {record["status"] for record in records} == {"ok"}
    assert {len(record["both_s"]) for record in records} == {2}
    assert all(0 < record["peak_share"] < 1 for record in records)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 10
    assert {line.count("|") for line in table} == {9}


def test_peers_are_run_where_they_are_installed(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("reformer_pytorch")
    records = run(
        tmp_path, "--lengths", "64", "--n-hashes", "2", "--layers", "transformers", "reformer-pytorch"
    )
    assert [record["status"] for record in records] == ["ok", "ok"]


def test_what_runs_out_of_memory_is_marked_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def greedy(shape: cuda_attention.Shape, *, length: int, n_hashes: int | None) -> cuda_attention.Layer:
        def layer(x: Tensor) -> Tensor:
            tried.append(length)
            raise torch.OutOfMemoryError("all of it")

        return layer

    monkeypatch.setattr(cuda_attention, "LAYERS", {**cuda_attention.LAYERS, cuda_attention.FULL: greedy})
    layers = ["--layers", cuda_attention.FULL, "ours, flex"]
    records = run(tmp_path, "--lengths", "32", "64", "--n-hashes", "1", *layers)
    assert [record["status"] for record in records[::2]] == ["out_of_memory"] * 2
    assert tried == [32]
    assert records[1]["status"].startswith("ValueError: backend='flex': it runs on cuda, not on cpu")


def test_nothing_is_begun_after_its_time(tmp_path: Path) -> None:
    layers = ["--layers", "ours, auto", cuda_attention.FULL]
    records = run(tmp_path, "--lengths", "32", "--seconds", "0", *layers)
    assert {record["status"] for record in records} == {"no_time"}


def test_peaks_are_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert cuda_attention.known_peak(torch.device("cuda")) == 989e12
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert cuda_attention.known_peak(torch.device("cuda")) is None
    assert cuda_attention.known_peak(torch.device("cpu")) is None
