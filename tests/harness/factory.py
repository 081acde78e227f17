"""Synthetic records: deterministic, with effects that are planted and so can be asked for."""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from harness.record import Measurement, Outcome, Sample, TrialRecord
from harness.store import Study

CODE = "0123456789abcdef"
ENVIRONMENT: Mapping[str, Any] = {
    "torch": "2.9.0",
    "python": "3.11.2",
    "numpy": "2.4.6",
    "threads": 2,
    "cpu_capability": "AVX512",
    "cpu_model": "Some CPU @ 2.10GHz",
    "device_name": "cpu",
    "platform": "Linux-x86_64",
    "allocator": {"MALLOC_ARENA_MAX": "1"},
    "commit": "a1b2c3d",
    "dirty": False,
    "mem_method": "profiler",
    "server_id": "s0",
    "physical_cores": 2,
    "memory_bytes": 8 * 2**30,
}
#: Planted: log-ratio of step time and of memory for each doubling of the rounds, memory of reversible.
TIME_PER_DOUBLING = math.log(1.6)
MEMORY_PER_DOUBLING = math.log(1.5)
REVERSIBLE_MEMORY = math.log(0.7)
#: Planted: points of accuracy for each doubling of the rounds, before any noise.
POINTS_PER_DOUBLING = 4.0


def spec(**settings: Any) -> dict[str, Any]:
    """A decoded spec as plain data; settings by dotted keys (dots as `__`) replace its defaults."""
    result: dict[str, Any] = {
        "attention": {
            "kind": "lsh",
            "n_hashes": 1,
            "n_buckets": 16,
            "chunk_length": 16,
            "n_chunks_before": 1,
            "n_chunks_after": 0,
            "causality": "strict",
            "backend": "eager",
        },
        "hashing": {"_target_": "reformer.hashing.CrossPolytope"},
        "local": {"chunk_length": 16, "n_chunks_before": 1},
        "model": {"d_model": 64, "n_layers": 1, "layers": ["lsh"], "residual": "plain", "axial_shape": None},
        "task": {"_target_": "harness.tasks.copy.Copy", "length": 128, "n_symbols": 63},
        "workload": {"_target_": "harness.workloads.train.Train"},
        "train": {"steps": 200, "batch_size": 32, "lr": 0.003},
        "evaluate": {"n_hashes": [1, 2, 4, 8], "hash_seeds": 2, "controls": ["full", "random", "knock_out"]},
        "device": "cpu",
        "dtype": "float32",
        "threads": 2,
        "seed": 0,
        "repeat": 0,
    }
    for key, value in settings.items():
        *path, last = key.replace("__", ".").split(".")
        place = result
        for part in path:
            place = place[part]
        place[last] = value
    return result


def text_task() -> dict[str, Any]:
    return {"_target_": "harness.tasks.text.Text", "length": 256, "corpus": "pycode"}


def trial_id(data: Mapping[str, Any]) -> str:
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:12]


def record(cell: Mapping[str, Any], *, experiment: str = "quick", **settings: Any) -> TrialRecord:
    """A finished trial of that cell; its numbers follow from its settings and its seed alone."""
    fields = {key: _parsed(level) for key, level in cell.items() if key not in ("attention", "task")}
    plain = spec(**fields, **settings)
    if "attention" in cell:
        plain["attention"]["kind"] = cell["attention"]
    if cell.get("task") == "text":
        plain["task"] = text_task()
    noise = np.random.default_rng(
        zlib.crc32(json.dumps([cell, settings], sort_keys=True, default=str).encode())
    )
    is_text = plain["task"]["_target_"].endswith("Text")
    return TrialRecord(
        trial_id=trial_id(plain),
        experiment=experiment,
        cell=dict(cell),
        code=CODE,
        spec=plain,
        outcome=Outcome(status="ok", checksum=(0.5).hex()),
        environment=ENVIRONMENT,
        samples=tuple(_samples(plain, noise=noise)),
        series={"train": _curve(plain, noise=noise)},
        theory={
            "quality": "bits_per_byte" if is_text else "accuracy",
            "chance_accuracy": None if is_text else 1 / 63,
            "majority_accuracy": None if is_text else 0.02,
            "evaluation_sha256": "e" * 64,
        },
        started_at=f"2026-01-02T03:{plain['seed']:02}:{int(noise.integers(60)):02}+00:00",
        duration_s=float(12 + noise.random()),
    )


def layer(
    implementation: str,
    length: int,
    *,
    step_s: float = 1.0,
    peak: float = 2.0**20,
    floor_s: float = 0.25,
    repeat: int = 0,
    workload: str = "attention.Attention",
    **settings: Any,
) -> TrialRecord:
    """A record of the workload `attention`, as `experiment=peers` makes them, or of `train_step`.

    Args:
        implementation: `ours`, `sdpa` or the name of a peer.
        step_s: forward and backward; a quarter of it is forward.
        floor_s: of both; a fifth of it is forward.
    """
    peer = implementation not in ("ours", "sdpa")
    plain = spec(**settings, repeat=repeat, task__length=length)
    plain["attention"]["kind"] = "full_standard" if implementation == "sdpa" else "lsh"
    plain["model"]["layers"] = [plain["attention"]["kind"]]
    plain["attention"]["causality"] = "published" if peer else "strict"
    plain["workload"] = {
        "_target_": f"harness.workloads.{workload}",
        "implementation": implementation if peer else "ours",
    }
    samples = (
        _sample("tokens_per_step", "tokens", length),
        _sample("forward_s", "s", step_s / 4),
        _sample("backward_s", "s", 3 * step_s / 4),
        _sample("step_s", "s", step_s),
        _sample("peak_alloc_bytes", "bytes", peak, phase="forward"),
        _sample("gemm_flop_per_s", "flop/s", 1e9),
        _sample("floor_flops", "flop", 0.2e9 * floor_s, phase="forward"),
        _sample("floor_flops", "flop", 0.8e9 * floor_s, phase="backward"),
    )
    return TrialRecord(
        trial_id=trial_id(plain),
        experiment="peers",
        cell={
            "implementation": implementation,
            "task.length": str(length),
            "repeat": str(repeat),
            **{key.replace("__", "."): str(value) for key, value in settings.items()},
        },
        code=CODE,
        spec=plain,
        outcome=Outcome(status="ok"),
        environment={**ENVIRONMENT, "backend": {"ours": "flash"}.get(implementation, implementation)},
        samples=samples,
        started_at="2026-01-02T03:04:05+00:00",
        duration_s=3.0,
    )


def _sample(metric: str, unit: str, value: float, *, phase: str | None = None) -> Sample:
    return Sample(metric=metric, unit=unit, values=(float(value),), phase=phase)


def measured(measurement: Measurement) -> TrialRecord:
    """The record of what a workload handed back, of no trial in particular."""
    return TrialRecord(
        trial_id="a",
        experiment="mine",
        cell={},
        code="",
        spec={},
        outcome=measurement.outcome,
        environment=measurement.environment,
        samples=measurement.samples,
        series=measurement.series,
        theory=measurement.theory,
    )


def sweep(levels: Mapping[str, Sequence[Any]], **settings: Any) -> list[TrialRecord]:
    """One record for each combination of the levels, in order."""
    cells = (
        dict(zip(levels, combination, strict=True)) for combination in itertools.product(*levels.values())
    )
    return [record({"seed": 0, **cell}, **settings) for cell in cells]


def failed(done: TrialRecord, *, status: str = "out_of_memory", **outcome: Any) -> TrialRecord:
    """The same trial, but ended in that way and without a single number."""
    return replace(
        done, outcome=Outcome(status=status, **outcome), samples=(), series={}, theory={"quality": "accuracy"}
    )


def scaled(done: TrialRecord, metric: str, factor: float, *, phase: str | None = None) -> TrialRecord:
    """The same trial with one quantity multiplied."""
    samples = tuple(
        replace(sample, values=tuple(value * factor for value in sample.values))
        if sample.metric == metric and phase in (None, sample.phase) and not sample.at
        else sample
        for sample in done.samples
    )
    return replace(done, samples=samples)


def store(
    path: Path, records: Sequence[TrialRecord], *, factors: Mapping[str, Sequence[str]] | None = None
) -> Path:
    """A study of these records on disk."""
    study = Study(path)
    study.create()
    for entry in records:
        study.write(entry)
    study.write_info(
        {
            "name": path.name,
            "experiment": records[0].experiment if records else "default",
            "command": "harness run -m attention.n_hashes=1,4",
            "factors": {key: list(levels) for key, levels in (factors or {}).items()},
            "created": "2026-01-02T03:00:00+00:00",
            "planned": [entry.trial_id for entry in records],
        }
    )
    return path


def _parsed(level: Any) -> Any:
    if isinstance(level, str):
        try:
            return json.loads(level)
        except ValueError:
            return level
    return level


def accuracy_of(plain: Mapping[str, Any], *, n_hashes: int) -> float:
    """The planted accuracy under so many rounds at evaluation."""
    attention = plain["attention"]
    if attention["kind"] != "lsh":
        return 0.99
    coarse = 20.0 if attention["n_buckets"] == 4 else 0.0
    return (80.0 - coarse + POINTS_PER_DOUBLING * math.log2(n_hashes)) / 100


def _samples(plain: Mapping[str, Any], *, noise: np.random.Generator) -> Iterator[Sample]:
    attention = plain["attention"]
    doublings = math.log2(attention["n_hashes"]) if attention["kind"] == "lsh" else 0.0
    reversible = plain["model"]["residual"] == "reversible"
    tokens = float(plain["train"]["batch_size"] * plain["task"]["length"])
    step = 0.05 * math.exp(TIME_PER_DOUBLING * doublings + 0.01 * noise.standard_normal())
    step *= 1.3 if reversible else 1.0
    for name, share in (("step_s", 1.0), ("forward_s", 0.35), ("backward_s", 0.55), ("optimizer_s", 0.1)):
        values = step * share * np.exp(0.02 * noise.standard_normal(40))
        values[:3] *= (4.0, 2.0, 1.5)
        yield Sample(metric=name, unit="s", values=tuple(float(value) for value in values))
    yield Sample(metric="tokens_per_step", unit="tokens", values=(tokens,))
    peak = 40 * 2**20 * math.exp(MEMORY_PER_DOUBLING * doublings + (REVERSIBLE_MEMORY if reversible else 0.0))
    for phase, share in (("forward", 0.8), ("backward", 1.0), ("optimizer", 0.3)):
        yield Sample(
            metric="peak_alloc_bytes", unit="bytes", values=(float(round(peak * share)),), phase=phase
        )
    yield Sample(metric="saved_bytes", unit="bytes", values=(float(round(peak * 0.6)),))
    yield Sample(metric="peak_rss_bytes", unit="bytes", values=(float(round(peak * 1.4 + 2e8)),))
    yield Sample(metric="flops", unit="flop", values=(float(round(3e9 * 2**doublings)),))
    yield Sample(metric="operators", unit="count", values=(400.0 + 50 * doublings,))
    yield Sample(metric="parameters", unit="count", values=(123456.0,))
    yield from _quality(plain, noise=noise)


def _quality(plain: Mapping[str, Any], *, noise: np.random.Generator) -> Iterator[Sample]:
    is_text = plain["task"]["_target_"].endswith("Text")
    shift = 0.003 * float(noise.standard_normal())
    settings: list[tuple[dict[str, int | str], float]] = [
        ({}, accuracy_of(plain, n_hashes=plain["attention"]["n_hashes"]))
    ]
    for rounds, seed in itertools.product(
        plain["evaluate"]["n_hashes"], range(plain["evaluate"]["hash_seeds"])
    ):
        wiggle = 0.002 * float(noise.standard_normal())
        settings.append(
            ({"n_hashes": rounds, "hash_seed": seed}, accuracy_of(plain, n_hashes=rounds) + wiggle)
        )
    settings += [
        ({"attention": "full"}, 0.99),
        ({"attention": "random", "hash_seed": 0}, 0.12),
        ({"attention": "knock_out"}, 0.017),
    ]
    scored = 8192.0
    for at, accuracy in settings:
        share = min(1.0, max(0.0, accuracy + shift)) * (0.5 if is_text else 1.0)
        yield Sample(metric="correct", unit="tokens", values=(float(round(scored * share)),), at=at)
        yield Sample(metric="scored", unit="tokens", values=(scored,), at=at)
        yield Sample(metric="nll_nats", unit="nats", values=(scored * (3.0 - 2 * share),), at=at)


def _curve(plain: Mapping[str, Any], *, noise: np.random.Generator) -> dict[str, list[float]]:
    steps = np.arange(1, plain["train"]["steps"] + 1)
    doublings = math.log2(plain["attention"]["n_hashes"])
    loss = (
        4.1 * np.exp(-steps / (80 - 8 * doublings)) + 0.1 + 0.05 * np.abs(noise.standard_normal(len(steps)))
    )
    return {"step": [float(step) for step in steps], "loss": [float(value) for value in loss]}
