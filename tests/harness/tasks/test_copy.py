"""Duplication: what a sequence is, what of it is scored, and which stream it comes from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks import Batch, Copy
from harness.tasks.task import IGNORED

#: Words of 15 symbols out of 63: that two are equal by chance is out of the question.
LONG = Copy(length=32, n_symbols=63, evaluation_tokens=300)

some_copies = st.builds(
    Copy,
    length=st.integers(2, 20).map(lambda half: 2 * half),
    n_symbols=st.integers(2, 70),
    evaluation_tokens=st.integers(1, 400),
)


def rows(batch: Batch) -> set[tuple[int, ...]]:
    return {tuple(row) for row in batch.tokens.tolist()}


def scored(batch: Batch) -> int:
    return int((batch.targets != IGNORED).sum())


@given(task=some_copies, seed=st.integers(0, 2**31 - 1), step=st.integers(0, 1000))
def test_a_word_is_said_twice_each_time_after_a_zero(task: Copy, seed: int, step: int) -> None:
    tokens = task.training_batch(seed=seed, step=step, batch_size=3).tokens
    first, second = np.split(tokens, 2, axis=1)
    assert tokens.shape == (3, task.length)
    assert (first == second).all()
    assert (first[:, 0] == 0).all()
    assert (first[:, 1:] >= 1).all()
    assert (first[:, 1:] <= task.n_symbols).all()
    assert task.vocab_size == task.n_symbols + 1


@given(task=some_copies)
def test_only_the_second_word_is_scored_where_it_has_to_be_foretold(task: Copy) -> None:
    batch = task.training_batch(seed=0, step=0, batch_size=2)
    half = task.length // 2
    asked = batch.targets != IGNORED
    # From the second zero, after which the word begins, to the symbol before the last.
    assert (asked == (np.arange(task.length) >= half) & (np.arange(task.length) < task.length - 1)).all()
    assert (batch.targets[:, half:-1] == batch.tokens[:, half + 1 :]).all()
    assert (batch.targets[:, half:-1] == batch.tokens[:, 1:half]).all()


def test_every_symbol_is_equally_likely() -> None:
    task = Copy(length=202, n_symbols=4)
    words = task.training_batch(seed=0, step=0, batch_size=100).tokens[:, 1:101]
    shares = np.bincount(words.ravel(), minlength=5) / words.size
    assert shares[0] == 0
    np.testing.assert_allclose(shares[1:], 1 / 4, atol=0.02)


def test_a_batch_is_known_by_seed_and_step() -> None:
    known = {
        (seed, step): LONG.training_batch(seed=seed, step=step, batch_size=4)
        for seed in range(3)
        for step in range(3)
    }
    again = LONG.training_batch(seed=1, step=2, batch_size=4)
    assert again.sha256() == known[1, 2].sha256()
    assert len(set().union(*map(rows, known.values()))) == 9 * 4


def test_the_evaluation_set_is_fixed_and_each_seed_has_its_own() -> None:
    LONG.training_batch(seed=0, step=7, batch_size=2)
    assert LONG.evaluation_set(seed=0).sha256() == LONG.evaluation_set(seed=0).sha256()
    assert not rows(LONG.evaluation_set(seed=0)) & rows(LONG.evaluation_set(seed=1))


def test_training_never_draws_what_is_evaluated() -> None:
    evaluated = set().union(*(rows(LONG.evaluation_set(seed=seed)) for seed in range(4)))
    for seed in range(4):
        for step in range(10):
            assert not rows(LONG.training_batch(seed=seed, step=step, batch_size=30)) & evaluated


@given(task=some_copies)
def test_as_many_tokens_are_scored_as_asked_for_and_not_a_sequence_more(task: Copy) -> None:
    tokens = scored(task.evaluation_set(seed=0))
    assert task.evaluation_tokens <= tokens < task.evaluation_tokens + task.word_length


def test_the_data_are_the_same_on_every_machine() -> None:
    assert (
        LONG.evaluation_set(seed=0).sha256()
        == "3b6308575265d11b7328548e9db1a0c1c3a88773686cab1c30adf6f792fbe972"
    )
    assert (
        LONG.training_batch(seed=3, step=5, batch_size=2).sha256()
        == "2b02c8e75a9b7141538d4583e6af646c51643d1f76ed0f9a8ac399ef9609f473"
    )


def test_floors() -> None:
    task = Copy(length=8, n_symbols=3, evaluation_tokens=3000)
    floors = task.theory(task.evaluation_set(seed=0))
    assert floors["chance_accuracy"] == 1 / 3
    assert floors["majority_accuracy"] == pytest.approx(1 / 3, abs=0.03)
    assert floors["majority_accuracy"] > 1 / 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 33}, "task.length=33: `0 w 0 w` has an even length; use 34"),
        ({"length": 2}, "task.length=2: must be at least 4"),
        ({"n_symbols": 1}, "task.n_symbols=1: must be at least 2"),
        ({"evaluation_tokens": 0}, "task.evaluation_tokens=0: must be at least 1"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^task\.") as caught:
        Copy(**{"length": 8, **settings})
    assert str(caught.value) == message
