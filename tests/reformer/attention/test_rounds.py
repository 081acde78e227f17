import torch

from reformer.attention.rounds import combine_rounds
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal


def rounds_of(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.softmax(dim=-1) @ values, logits.logsumexp(dim=-1)


def test_combined_rounds_are_one_softmax_over_their_union() -> None:
    logits = 3 * normal(BATCH, HEADS, 5, SEQ, 13)
    values = normal(BATCH, HEADS, 5, 13, DIM, seed=1)
    out, logsumexp = rounds_of(logits, values)
    union = logits.transpose(2, 3).flatten(3).softmax(dim=-1) @ values.flatten(2, 3)
    torch.testing.assert_close(combine_rounds(out, logsumexp), union, rtol=0, atol=1e-12)
    assert (out.mean(dim=2) - union).abs().max() > 0.1


def test_a_round_that_saw_nothing_has_no_say() -> None:
    out, logsumexp = normal(BATCH, HEADS, 2, SEQ, DIM), normal(BATCH, HEADS, 2, SEQ, seed=1)
    logsumexp[:, :, 1] = -1e30
    assert torch.equal(combine_rounds(out, logsumexp), out[:, :, 0])


def test_one_round_is_left_as_it_is() -> None:
    out, logsumexp = normal(BATCH, HEADS, 1, SEQ, DIM), normal(BATCH, HEADS, 1, SEQ, seed=1)
    assert torch.equal(combine_rounds(out, logsumexp), out[:, :, 0])


def test_weights_are_computed_wide_and_the_result_keeps_the_dtype() -> None:
    out = normal(BATCH, HEADS, 2, SEQ, DIM, dtype=torch.bfloat16)
    logsumexp = 1e5 + normal(BATCH, HEADS, 2, SEQ, seed=1)
    combined = combine_rounds(out, logsumexp)
    assert combined.dtype == torch.bfloat16
    torch.testing.assert_close(combined.double(), combine_rounds(out.double(), logsumexp), rtol=0, atol=0.03)
