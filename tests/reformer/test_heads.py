from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reformer.heads import ClassificationHead, LanguageModelHead
from reformer.streams import Streams
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, integers, normal, small_config
from tests.reformer.memory import allocations, tensor_bytes

VOCAB = 23


def build(*, dtype: torch.dtype = torch.float64, **settings: Any) -> LanguageModelHead:
    torch.manual_seed(0)
    config = small_config(**settings)
    embedding = nn.Embedding(config.vocab_size, config.d_model)
    return LanguageModelHead(config, embedding=embedding).to(dtype)


def halves(joined: torch.Tensor) -> Streams:
    """The streams that are joined side by side."""
    return Streams(*joined.chunk(2, dim=-1))


def some_targets() -> torch.Tensor:
    targets = integers(VOCAB, BATCH, SEQ)
    targets[0, :7], targets[1, [3, 28]] = -100, -100
    return targets


@pytest.mark.parametrize("length", [None, 1, 5, 29, 31])
def test_the_loss_is_the_mean_cross_entropy_over_scored_targets(length: int | None) -> None:
    head, joined, targets = (
        build(loss_chunk_length=length),
        normal(BATCH, SEQ, 28).requires_grad_(),
        some_targets(),
    )
    expected = F.cross_entropy(head(halves(joined)).flatten(0, 1), targets.flatten())
    actual = head.loss(halves(joined), targets)
    inputs = [joined, *head.parameters()]
    assert_all_close(
        [actual, *torch.autograd.grad(actual, inputs)],
        [expected, *torch.autograd.grad(expected, inputs)],
        tolerance=1e-12,
    )


@pytest.mark.parametrize("length", [None, 5])
def test_without_scored_targets_the_loss_is_zero_with_zero_gradients(length: int | None) -> None:
    head, joined = build(loss_chunk_length=length), normal(BATCH, SEQ, 28).requires_grad_()
    loss = head.loss(halves(joined), torch.full((BATCH, SEQ), -100))
    loss.backward()
    assert loss == 0
    assert joined.grad is not None
    assert (joined.grad == 0).all()


@pytest.mark.parametrize("length", [None, 1, 5, 31])
def test_scores_are_sums_over_scored_targets(length: int | None) -> None:
    head, joined, targets = build(loss_chunk_length=length), normal(BATCH, SEQ, 28), some_targets()
    targets[1, 5] = head(halves(joined))[1, 5].argmax()
    scores = head.score(halves(joined), targets)
    asked = targets != -100
    assert scores.scored == asked.sum() == 2 * SEQ - 9
    assert scores.correct == (head(halves(joined)).argmax(dim=-1)[asked] == targets[asked]).sum() >= 1
    expected = F.cross_entropy(head(halves(joined))[asked].float(), targets[asked], reduction="sum")
    assert_all_close([scores.nll_nats], [expected], tolerance=1e-6)
    assert scores.nll_nats.dtype == torch.float64


@pytest.mark.parametrize("length", [None, 5])
def test_an_empty_batch_scores_nothing(length: int | None) -> None:
    head = build(loss_chunk_length=length)
    for batch, seq in ((0, SEQ), (BATCH, 0)):
        scores = head.score(halves(normal(batch, seq, 28)), integers(VOCAB, batch, seq))
        assert [float(x) for x in scores] == [0, 0, 0]
        assert head.loss(halves(normal(batch, seq, 28)), integers(VOCAB, batch, seq)) == 0


def test_under_autocast_the_loss_is_float32_and_near_the_wide_one() -> None:
    head, joined, targets = (
        build(dtype=torch.float32),
        normal(BATCH, SEQ, 28, dtype=torch.float32),
        some_targets(),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(halves(joined), targets)
    assert loss.dtype == torch.float32
    assert_all_close([loss], [head.loss(halves(joined), targets)], tolerance=2e-2)


def test_the_loss_of_a_narrow_model_is_summed_in_float32() -> None:
    head, targets = build(dtype=torch.bfloat16), some_targets()
    joined = normal(BATCH, SEQ, 28, dtype=torch.bfloat16)
    loss = head.loss(halves(joined), targets)
    assert loss.dtype == torch.float32
    logits = head(halves(joined)).float().flatten(0, 1)
    assert_all_close([loss], [F.cross_entropy(logits, targets.flatten())], tolerance=1e-6)


def test_tied_weights_are_the_embedding_and_get_its_gradient() -> None:
    torch.manual_seed(0)
    config = small_config(tie_weights=True, merge="mean")
    embedding = nn.Embedding(VOCAB, 14)
    head = LanguageModelHead(config, embedding=embedding)
    joined = normal(BATCH, SEQ, 14, dtype=torch.float32)
    normed = head.norm(joined)
    with torch.no_grad():
        embedding.weight.mul_(2)
    assert_all_close(
        [head(Streams(joined, joined))], [normed @ embedding.weight.T + head.projection.bias], tolerance=1e-6
    )
    head.loss(Streams(joined, joined), some_targets()).backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("call", ["loss", "score"])
def test_chunks_never_hold_logits_of_all_rows(call: str) -> None:
    seq, vocab, length = 512, 997, 16
    joined = normal(BATCH, seq, 28, dtype=torch.float32).requires_grad_()
    targets = integers(vocab, BATCH, seq)
    logits = tensor_bytes(BATCH, seq, vocab)

    def measured(loss_chunk_length: int | None) -> tuple[int, int]:
        head = build(dtype=torch.float32, vocab_size=vocab, loss_chunk_length=loss_chunk_length)
        if call == "loss":
            found = allocations(lambda: head.loss(halves(joined), targets).backward())
        else:
            found = allocations(lambda: head.score(halves(joined), targets))
        return found.peak, found.largest

    peak, largest = measured(None)
    assert largest == logits
    assert peak >= 2 * logits
    peak, largest = measured(length)
    assert largest <= logits / 8
    assert peak <= logits / 2


@pytest.mark.parametrize("between", ["nothing", "evaluation"])
def test_blocks_that_are_computed_again_drop_what_they_dropped(between: str) -> None:
    head, joined = build(loss_chunk_length=5, dropout=0.5), normal(BATCH, SEQ, 28).requires_grad_()
    targets, inputs = some_targets(), [joined, *head.parameters()]
    torch.manual_seed(3)
    blocks = zip(joined.split(5, dim=1), targets.split(5, dim=1), strict=True)
    total = torch.zeros((), dtype=torch.float64)
    for rows, wanted in blocks:
        logits = F.dropout(head.norm(rows), 0.5) @ head.projection.weight.T + head.projection.bias
        total = total + F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum")
    expected = total / (targets != -100).sum()
    torch.manual_seed(3)
    actual = head.loss(halves(joined), targets)
    if between == "evaluation":
        head.eval()
    found = torch.autograd.grad(actual, inputs)
    assert_all_close([actual, *found], [expected, *torch.autograd.grad(expected, inputs)], tolerance=1e-12)


@pytest.mark.parametrize("merge", ["concat", "mean"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_classifier_s_head_is_a_tanh_layer_between_norm_and_classes(merge: str, norm: str) -> None:
    head = ClassificationHead(small_config(merge=merge, norm=norm), n_classes=5).double()
    joined = normal(BATCH, 1, 28 if merge == "concat" else 14)
    hidden = (head.norm(joined) @ head.dense.weight.T + head.dense.bias).tanh()
    assert hidden.shape[-1] == 14
    expected = hidden @ head.projection.weight.T + head.projection.bias
    streams = halves(joined) if merge == "concat" else Streams(joined, joined)
    assert_all_close([head(streams)], [expected], tolerance=1e-12)
    assert expected.shape[-1] == 5


def test_a_classifier_s_head_drops_before_both_of_its_layers() -> None:
    head = ClassificationHead(small_config(dropout=0.5), n_classes=5).double()
    joined = normal(BATCH, 1, 28)
    torch.manual_seed(3)
    actual = head(halves(joined))
    torch.manual_seed(3)
    hidden = head.dense(F.dropout(head.norm(joined), 0.5)).tanh()
    assert_all_close([actual], [head.projection(F.dropout(hidden, 0.5))], tolerance=1e-12)
    head.eval()
    assert torch.equal(head(halves(joined)), head(halves(joined)))
