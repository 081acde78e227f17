"""Benchmarks are collected by `make bench` alone: they tell times, which no test may depend on."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    only = config.getoption("benchmark_only", default=False)
    return None if only else collection_path.name.startswith("test_") or None
