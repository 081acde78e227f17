"""Duplication: repeat what was seen half a sequence ago."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from harness.tasks.task import (
    EVALUATION_STREAM,
    IGNORED,
    TRAINING_STREAM,
    Batch,
    Task,
    Tokens,
    majority_accuracy,
)


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """Sequences `0 w 0 w`, w uniform over {1..n_symbols}; only the second w is scored.

    Args:
        n_symbols: distinct symbols of w.

    Source: Kitaev, Kaiser, Levskaya 2020, §5 "Effect of sharing QK / LSH attention in Transformer".
    """

    n_symbols: int = 63

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length % 2:
            raise ValueError(
                f"task.length={self.length}: `0 w 0 w` has an even length; use {self.length + 1}"
            )
        if self.n_symbols < 2:
            raise ValueError(f"task.n_symbols={self.n_symbols}: must be at least 2")

    @property
    def vocab_size(self) -> int:
        return self.n_symbols + 1

    @property
    def word_length(self) -> int:
        """Symbols of w."""
        return self.length // 2 - 1

    def training_batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        return self._draw(np.random.default_rng([TRAINING_STREAM, seed, step]), batch_size)

    def evaluation_set(self, *, seed: int) -> Batch:
        rows = -(-self.evaluation_tokens // self.word_length)
        return self._draw(np.random.default_rng([EVALUATION_STREAM, seed]), rows)

    def theory(self, evaluation: Batch) -> Mapping[str, float | str | None]:
        return {
            "chance_accuracy": 1 / self.n_symbols,
            "majority_accuracy": majority_accuracy(evaluation.targets),
        }

    def _draw(self, random: np.random.Generator, rows: int) -> Batch:
        word = random.integers(1, self.n_symbols + 1, size=(rows, self.word_length), dtype=np.int64)
        half = np.concatenate([np.zeros((rows, 1), dtype=np.int64), word], axis=1)
        tokens = np.concatenate([half, half], axis=1)
        targets: Tokens = np.full_like(tokens, IGNORED)
        start = self.length // 2
        targets[:, start:-1] = tokens[:, start + 1 :]
        return Batch(tokens, targets)
