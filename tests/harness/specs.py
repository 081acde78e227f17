"""Specs small enough to train in a moment: the shipped configuration with other values."""

from __future__ import annotations

import copy
import functools
from typing import Any

from harness.codec import decode
from harness.spec import TrialSpec

_SMALL: dict[str, Any] = {
    "attention__n_hashes": 2,
    "attention__n_buckets": 4,
    "attention__chunk_length": 8,
    "hashing": {"_target_": "reformer.CrossPolytope"},
    "model__d_model": 16,
    "model__d_ff": 24,
    "model__n_heads": 2,
    "model__layers": ["lsh"],
    "model__residual": "plain",
    "task": {"_target_": "harness.tasks.Copy", "length": 32, "n_symbols": 7, "evaluation_tokens": 100},
    "train__steps": 4,
    "train__batch_size": 3,
    "train__lr": 0.01,
    "train__warmup_steps": 2,
    "evaluate__n_hashes": [1, 3],
    "evaluate__hash_seeds": [0, 5],
    "threads": 1,
}


@functools.cache
def _shipped() -> dict[str, Any]:
    """The composed configuration as plain data."""
    from hydra.types import RunMode

    from harness.cli import _hydra, _parse
    from hydra_plugins.harness_sweeper._sweeper import _without_hydra, plain_config

    with _hydra(_parse([], command="run")) as hydra:
        return plain_config(_without_hydra(hydra.compose_config("config", [], RunMode.RUN)))


def plain_spec(**settings: Any) -> dict[str, Any]:
    """A valid spec as plain data; settings by dotted keys (dots as `__`) replace its values."""
    data = copy.deepcopy(_shipped())
    for key, value in {**_SMALL, **settings}.items():
        *path, last = key.split("__")
        place = data
        for part in path:
            place = place[part]
        place[last] = copy.deepcopy(value)
    return data


def trial_spec(**settings: Any) -> TrialSpec:
    """The same, decoded."""
    return decode(plain_spec(**settings))
