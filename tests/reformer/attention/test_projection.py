import pytest
import torch

from reformer.attention.projection import unit_keys
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal


def test_keys_have_unit_length_and_the_direction_of_their_query() -> None:
    qk = 5 * normal(BATCH, HEADS, SEQ, DIM)
    keys = unit_keys(qk)
    torch.testing.assert_close(keys, qk / qk.norm(dim=-1, keepdim=True), rtol=1e-5, atol=0)


def test_keys_follow_the_formula_with_its_epsilon() -> None:
    qk = torch.tensor([[3.0, 4.0]], dtype=torch.float64) * 1e-3
    # mean(q²) = 12.5e-6, plus 1e-6.
    expected = qk * (13.5e-6) ** -0.5 / 2**0.5
    torch.testing.assert_close(unit_keys(qk), expected, rtol=1e-12, atol=0)


def test_sqrt_d_divides_once_more() -> None:
    qk = normal(BATCH, HEADS, SEQ, DIM)
    torch.testing.assert_close(
        unit_keys(qk, logit_scale="sqrt_d") * DIM**0.5, unit_keys(qk), rtol=1e-12, atol=0
    )


def test_an_all_zero_query_has_a_finite_key_and_gradient() -> None:
    qk = torch.zeros(3, DIM, requires_grad=True)
    keys = unit_keys(qk)
    keys.sum().backward()
    assert (keys == 0).all()
    assert qk.grad is not None
    assert qk.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_queries_are_normalised_in_float32_and_keep_their_dtype(dtype: torch.dtype) -> None:
    qk = (200 * normal(SEQ, DIM)).to(dtype)  # squares overflow float16
    keys = unit_keys(qk)
    assert keys.dtype == dtype
    torch.testing.assert_close(keys.double(), unit_keys(qk.double()), rtol=0, atol=4e-3)
