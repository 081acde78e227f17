"""The interface of a task: seeded training batches, and one fixed evaluation set."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

#: Targets of this value are not scored.
IGNORED = -100

#: Names of the separate random streams of a seed.
TRAINING_STREAM, EVALUATION_STREAM = 1, 2

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Token ids and what each position should predict, both [batch, seq]; −100 where nothing is asked."""

    tokens: Tokens
    targets: Tokens

    def sha256(self) -> str:
        """Checksum of both arrays."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(self.targets.tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Something to learn. The task alone fixes the length of its sequences.

    To add one, write a frozen dataclass in a file of its own under `harness/tasks/` and a yaml of the same
    name under `conf/task/` whose `_target_` is the class.

    Args:
        length: tokens a sequence.
        evaluation_tokens: scored tokens of the evaluation set, at least.
    """

    length: int
    evaluation_tokens: int = 8192

    #: What the table shows of this task: `accuracy` or `bits_per_byte`.
    quality: ClassVar[str] = "accuracy"

    def __post_init__(self) -> None:
        if self.length < 4:
            raise ValueError(f"task.length={self.length}: must be at least 4")
        if self.evaluation_tokens < 1:
            raise ValueError(f"task.evaluation_tokens={self.evaluation_tokens}: must be at least 1")

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of token ids."""

    @abstractmethod
    def training_batch(self, *, seed: int, step: int, batch_size: int) -> Batch:
        """The batch of one training step; the same arguments give the same batch."""

    def check_evaluation(self) -> None:  # noqa: B027 (most tasks have one for any length)
        """Refuse settings under which there is no evaluation set.

        Raises:
            ValueError: names the value, the rule and the mend.
        """

    @abstractmethod
    def evaluation_set(self, *, seed: int) -> Batch:
        """The fixed evaluation set of a seed, from a stream that training never draws from."""

    @abstractmethod
    def theory(self, evaluation: Batch) -> Mapping[str, float | str | None]:
        """Floors that need no model (`chance_accuracy`, `majority_accuracy`), and what the data is."""


def majority_accuracy(targets: Tokens) -> float:
    """Accuracy of always answering the most frequent target."""
    scored = targets[targets != IGNORED]
    return float(np.bincount(scored).max() / scored.size)
