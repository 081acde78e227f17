"""Byte-level language modelling of real text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from harness.tasks import corpora
from harness.tasks.task import TRAINING_STREAM, Batch, Task, majority_accuracy


@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Predict the next byte at every position; windows start anywhere in the training files.

    The evaluation windows lie at even distances in files that training never sees, the same for all seeds.

    Args:
        corpus: `pycode`, the Python source of sympy.
    """

    corpus: str = "pycode"
    quality: ClassVar[str] = "bits_per_byte"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_length(self._corpus.training.size, part="training")

    def check_evaluation(self) -> None:
        self._check_length(self._corpus.evaluation.size, part="evaluation")

    @property
    def vocab_size(self) -> int:
        return 256

    def training_batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        stream = self._corpus.training
        random = np.random.default_rng([TRAINING_STREAM, seed, step])
        return self._windows(stream, random.integers(0, stream.size - self.length, size=batch_size))

    def evaluation_set(self, *, seed: int) -> Batch:
        stream = self._corpus.evaluation
        rows = -(-self.evaluation_tokens // self.length)
        starts = np.linspace(0, stream.size - self.length - 1, rows).astype(np.int64)
        return self._windows(stream, starts)

    def theory(self, evaluation: Batch) -> Mapping[str, float | str | None]:
        corpus = self._corpus
        return {
            "chance_accuracy": 1 / self.vocab_size,
            "majority_accuracy": majority_accuracy(evaluation.targets),
            "corpus": corpus.name,
            "corpus_bytes": corpus.training.size + corpus.evaluation.size,
            "corpus_files": corpus.files,
            "corpus_sha256": corpus.sha256,
        }

    def _check_length(self, size: int, *, part: str) -> None:
        if self.length + 1 > size:
            raise ValueError(
                f"task.length={self.length}: the {part} part of {self.corpus} has {size} bytes; "
                f"use task.length={size - 1} or less"
            )

    @property
    def _corpus(self) -> corpora.Corpus:
        return corpora.load(self.corpus)

    def _windows(self, stream: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64]) -> Batch:
        windows = stream[starts[:, None] + np.arange(self.length + 1)].astype(np.int64)
        return Batch(windows[:, :-1], windows[:, 1:])
