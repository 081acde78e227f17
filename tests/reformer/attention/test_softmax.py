import pytest
import torch

from reformer.attention.softmax import softmax_and_logsumexp
from tests.reformer.helpers import assert_all_close, normal


@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_it_is_a_softmax_and_its_log_sum_exp(scale: float) -> None:
    scores = scale * normal(2, 3, 13)
    weights, logsumexp = softmax_and_logsumexp(scores)
    assert_all_close(
        [weights, logsumexp], [scores.softmax(dim=-1), scores.logsumexp(dim=-1)], tolerance=1e-13
    )


def test_gradients_flow_through_both_results() -> None:
    scores = normal(2, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(softmax_and_logsumexp, (scores,))
    assert torch.autograd.gradgradcheck(softmax_and_logsumexp, (scores,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_scores_have_no_weight_and_a_row_of_them_stays_finite(dtype: torch.dtype) -> None:
    scores = torch.tensor([[-1e30, 2.0, -1e5], [-1e30, -1e5, -1e30], [-1e30] * 3], dtype=dtype)
    weights, logsumexp = softmax_and_logsumexp(scores)
    assert weights[:2].tolist() == [[0, 1, 0], [0, 1, 0]]
    assert logsumexp.tolist()[:2] == [2, -1e5]
    assert logsumexp[2] < -1e29
    assert weights.isfinite().all()
