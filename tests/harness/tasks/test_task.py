"""What all tasks share: batches with a checksum, and the floor of the most frequent answer."""

from __future__ import annotations

import hashlib

import numpy as np

from harness.tasks import Batch
from harness.tasks.task import IGNORED, majority_accuracy


def integers(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64)


def test_the_checksum_of_a_batch_is_that_of_its_bytes() -> None:
    batch = Batch(integers([1, 2]), integers([2, IGNORED]))
    expected = b"".join(value.to_bytes(8, "little", signed=True) for value in (1, 2, 2, IGNORED))
    assert batch.sha256() == hashlib.sha256(expected).hexdigest()


def test_the_checksum_sees_tokens_targets_and_their_order() -> None:
    batches = [
        Batch(integers([1, 2]), integers([2, 1])),
        Batch(integers([2, 1]), integers([2, 1])),
        Batch(integers([1, 2]), integers([2, IGNORED])),
        Batch(integers([2, 1]), integers([1, 2])),
    ]
    assert len({batch.sha256() for batch in batches}) == len(batches)


def test_the_checksum_is_of_values_not_of_how_they_lie_in_memory() -> None:
    wide = integers([1, 9, 2, 9], [3, 9, 4, 9])
    scattered = Batch(wide[:, ::2], wide[:, ::2])
    assert scattered.sha256() == Batch(integers([1, 2], [3, 4]), integers([1, 2], [3, 4])).sha256()


def test_the_majority_is_the_most_frequent_scored_target() -> None:
    assert majority_accuracy(integers([3, 3, 3, 1], [0, 0, 1, 3])) == 4 / 8
    assert majority_accuracy(integers([2, 2, 2, 2])) == 1


def test_the_majority_leaves_out_what_is_not_scored() -> None:
    assert majority_accuracy(integers([IGNORED, IGNORED, IGNORED, 5, 5, 0])) == 2 / 3
