"""Text: windows of bytes, drawn from the training files or laid out evenly over the held-out ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from harness.tasks import Batch, Text, corpora
from harness.tasks.corpora import Corpus

HELD_OUT_FROM = 128


def corpus(*, training: int, evaluation: int) -> Corpus:
    """A corpus whose bytes are their own positions; held-out ones count from 128."""
    return Corpus(
        name="counting",
        training=np.arange(training, dtype=np.uint8),
        evaluation=np.arange(HELD_OUT_FROM, HELD_OUT_FROM + evaluation, dtype=np.uint8),
        files=2,
        sha256="c0ffee",
    )


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a counting corpus in the place of the real one."""

    def replace(*, training: int = 100, evaluation: int = 60) -> None:
        made = corpus(training=training, evaluation=evaluation)
        monkeypatch.setattr(corpora, "load", lambda name: made)

    replace()
    return replace


def training(task: Text, *, steps: int, batch_size: int = 4) -> list[Batch]:
    return [task.training_batch(seed=0, step=step, batch_size=batch_size) for step in range(steps)]


@pytest.mark.usefixtures("counting")
def test_each_position_is_asked_for_the_byte_that_follows_it() -> None:
    task = Text(length=8, evaluation_tokens=64)
    for batch in (task.training_batch(seed=0, step=0, batch_size=5), task.evaluation_set(seed=0)):
        assert batch.tokens.dtype == batch.targets.dtype == np.int64
        assert (np.diff(batch.tokens, axis=1) == 1).all()
        assert (batch.targets == batch.tokens + 1).all()


@pytest.mark.usefixtures("counting")
def test_a_batch_has_the_length_of_the_task() -> None:
    batch = Text(length=8).training_batch(seed=0, step=0, batch_size=5)
    assert batch.tokens.shape == batch.targets.shape == (5, 8)


@pytest.mark.usefixtures("counting")
def test_training_and_evaluation_share_no_file() -> None:
    task = Text(length=8, evaluation_tokens=200)
    assert max(batch.targets.max() for batch in training(task, steps=50)) < HELD_OUT_FROM
    assert task.evaluation_set(seed=0).tokens.min() >= HELD_OUT_FROM


def test_windows_start_anywhere_the_last_place_included(counting: Callable[..., None]) -> None:
    counting(training=11, evaluation=60)
    batches = training(Text(length=8), steps=20)
    starts = {int(start) for batch in batches for start in batch.tokens[:, 0]}
    assert starts == {0, 1, 2}
    assert max(batch.targets.max() for batch in batches) == 10


@pytest.mark.usefixtures("counting")
def test_a_batch_is_known_by_seed_and_step() -> None:
    task = Text(length=8)
    checksums = [
        task.training_batch(seed=seed, step=step, batch_size=6).sha256()
        for seed in range(3)
        for step in range(3)
    ]
    assert len(set(checksums)) == len(checksums)
    assert task.training_batch(seed=1, step=2, batch_size=6).sha256() == checksums[5]


@pytest.mark.usefixtures("counting")
def test_evaluation_windows_lie_evenly_from_the_first_byte_to_the_last() -> None:
    batch = Text(length=9, evaluation_tokens=6 * 9).evaluation_set(seed=0)
    assert (batch.tokens[:, 0] - HELD_OUT_FROM).tolist() == [0, 10, 20, 30, 40, 50]
    assert batch.targets.max() == HELD_OUT_FROM + 59


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (8, 1), (9, 2), (800, 100)])
def test_as_many_tokens_are_scored_as_asked_for(tokens: int, windows: int) -> None:
    batch = Text(length=8, evaluation_tokens=tokens).evaluation_set(seed=0)
    assert batch.targets.shape == (windows, 8)


@pytest.mark.usefixtures("counting")
def test_the_evaluation_set_is_the_same_for_all_seeds() -> None:
    task = Text(length=8)
    assert task.evaluation_set(seed=0).sha256() == task.evaluation_set(seed=1).sha256()


@pytest.mark.usefixtures("counting")
def test_a_record_tells_which_bytes_were_learnt() -> None:
    task = Text(length=8, evaluation_tokens=64)
    told = task.theory(task.evaluation_set(seed=0))
    assert told["chance_accuracy"] == 1 / 256
    assert told["corpus"] == "counting"
    assert told["corpus_bytes"] == 160
    assert told["corpus_files"] == 2
    assert told["corpus_sha256"] == "c0ffee"
    assert (task.quality, task.vocab_size) == ("bits_per_byte", 256)


def test_a_part_shorter_than_a_window_is_refused(counting: Callable[..., None]) -> None:
    counting(training=9, evaluation=60)
    Text(length=8).check_evaluation()
    with pytest.raises(ValueError, match=r"^task\.") as caught:
        Text(length=9)
    words = "task.length=9: the training part of pycode has 9 bytes; use task.length=8 or less"
    assert str(caught.value) == words
    counting(training=60, evaluation=9)
    Text(length=8).check_evaluation()
    # Who never evaluates needs no such part.
    longer = Text(length=9)
    with pytest.raises(ValueError, match=r"^task\.") as caught:
        longer.check_evaluation()
    assert str(caught.value) == words.replace("training", "evaluation")


def test_real_text_is_mostly_not_its_most_frequent_byte() -> None:
    task = Text(length=512, evaluation_tokens=16384)
    evaluation = task.evaluation_set(seed=0)
    assert 0.1 < float(task.theory(evaluation)["majority_accuracy"] or 0) < 0.5


def test_the_real_data_are_the_same_on_every_machine() -> None:
    task = Text(length=64, evaluation_tokens=640)
    assert (
        task.evaluation_set(seed=0).sha256()
        == "3e32eba363061836378d07f394ef05859cfb3ff4014f5d9e63949b6db7887134"
    )
    assert (
        task.training_batch(seed=3, step=5, batch_size=2).sha256()
        == "49d56bd2c8004d7e4069c291b921347aff4d235593849f7b4d1ab56c54b7ac17"
    )
