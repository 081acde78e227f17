"""More evaluation on weights that were kept."""

from __future__ import annotations

import pytest

from harness.evaluating import _merged
from harness.record import Sample, TrialRecord
from tests.harness.conftest import Shell

TINY = (
    *("task.length=32", "task.n_symbols=7", "task.evaluation_tokens=100", "attention.chunk_length=8"),
    *("model.d_model=16", "model.n_heads=2", "model.n_layers=1", "train.steps=3", "train.batch_size=3"),
    *("attention.n_buckets=4", "threads=1", "evaluate.hash_seeds=[0,5]", "evaluate.controls=[]"),
)


def train(shell: Shell, *words: str, study: str = "mine") -> TrialRecord:
    result = shell("run", *TINY, "train.save_weights=true", f"study={study}", *words)
    assert result.code == 0, result.out + result.err
    (record,) = shell.records(study)
    return record


def at(record: TrialRecord, **setting: int | str) -> dict[str, tuple[float, ...]]:
    return {
        sample.metric: sample.values
        for sample in record.samples
        if all(sample.at.get(key) == value for key, value in setting.items()) and sample.at
    }


def test_what_is_evaluated_later_is_what_would_have_been_evaluated_at_once(shell: Shell) -> None:
    before = train(shell, "evaluate.n_hashes=[1]")
    at_once = train(shell, "evaluate.n_hashes=[1,3]", "evaluate.controls=[knock_out]", study="at_once")
    assert not at(before, n_hashes=3)
    result = shell("evaluate", "mine", "evaluate.n_hashes=[3]", "evaluate.controls=[knock_out]")
    assert (result.code, result.err) == (0, "")
    assert "3 results" in result.out
    (after,) = shell.records("mine")
    assert at(after, n_hashes=3, hash_seed=5) == at(at_once, n_hashes=3, hash_seed=5)
    assert at(after, attention="knock_out") == at(at_once, attention="knock_out")
    assert at(after, n_hashes=1) == at(before, n_hashes=1)
    assert after.trial_id == before.trial_id
    assert (
        "1 done" in shell("plan", *TINY, "train.save_weights=true", "evaluate.n_hashes=[1]", "study=mine").out
    )
    # Again changes nothing but the file.
    shell("evaluate", "mine", "evaluate.n_hashes=[3]")
    assert len(shell.records("mine")[0].samples) == len(after.samples)


def test_trials_that_keep_no_weights_have_the_ids_they_always_had(shell: Shell) -> None:
    record = train(shell)
    assert shell("run", *TINY, "study=bare").code == 0
    (bare,) = shell.records("bare")
    assert record.trial_id != bare.trial_id
    assert "save_weights" not in bare.spec["train"]
    assert not shell.study("bare").weights_path(bare.trial_id).exists()


def test_trials_whose_weights_cannot_be_evaluated_are_told(shell: Shell) -> None:
    record = train(shell)
    weights = shell.study("mine").weights_path(record.trial_id)
    weights.write_bytes(b"no weights at all")
    result = shell("evaluate", "mine", "evaluate.n_hashes=[2]")
    assert result.code == 1
    assert "no file of weights" in result.complaint
    assert shell.records("mine") == [record]
    weights.rename(weights.with_name("000000000000.safetensors"))
    result = shell("evaluate", "mine", "evaluate.n_hashes=[2]")
    assert result.code == 2
    assert "there are weights, but no good record of that trial" in result.err
    assert "study mine has no weights to evaluate" in result.err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("evaluate.n_hashes=[0]",), "evaluate.n_hashes=[0]: each must be at least 1"),
        (("train.steps=3",), "train.steps=3: give settings of evaluate"),
        (("evaluate.nonsense=[1]",), "evaluate.nonsense=[1]: give settings of evaluate"),
        (("evaluate.controls=[magic]",), "use one of full, oracle, random, knock_out"),
    ],
)
def test_one_line_for_what_cannot_be(words: tuple[str, ...], complaint: str, shell: Shell) -> None:
    train(shell)
    result = shell("evaluate", "mine", *words)
    assert result.code != 0
    assert complaint in result.complaint


def test_weights_are_kept_only_by_what_trains(shell: Shell) -> None:
    result = shell("run", *TINY, "workload=train_step", "train.save_weights=true")
    assert (result.code, result.complaint.partition(": ")[2]) == (
        2,
        "train.save_weights=true: this workload trains no weights to keep; use false",
    )


def test_samples_are_told_apart_by_their_setting() -> None:
    def sample(value: float, **setting: int) -> Sample:
        return Sample(metric="correct", unit="tokens", values=(value,), at=setting)

    merged = _merged(
        [sample(1.0), sample(2.0, n_hashes=1)], [sample(3.0, n_hashes=1), sample(4.0, n_hashes=2)]
    )
    assert [entry.values[0] for entry in merged] == [1.0, 3.0, 4.0]
