from collections.abc import Callable
from typing import Any

import pytest
import torch

from reformer import full_attention, full_standard_attention
from reformer.attention import reference
from tests.reformer.attention.test_reference import NARROW, assert_near_float64
from tests.reformer.helpers import (
    BATCH,
    DIM,
    HEADS,
    SEQ,
    VALUE,
    assert_all_close,
    normal,
    one_hot_values,
    query_and_value,
    value_and_gradients,
)


def padding() -> torch.Tensor:
    real = torch.ones(BATCH, SEQ, dtype=torch.bool)
    real[0, :3] = False
    real[1, [4, 5, 23, 28]] = False
    return real


def standard_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool, real: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(v)
    for b in range(BATCH):
        for i in range(SEQ):
            keys = [j for j in range(SEQ) if real[b, j] and (j <= i or not causal)]
            if real[b, i]:
                weights = (q[b, :, i : i + 1] @ k[b][:, keys].transpose(-1, -2) / DIM**0.5).softmax(dim=-1)
                out[b, :, i] = (weights @ v[b][:, keys])[:, 0]
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_standard_attention_is_a_softmax_over_the_real_past(causal: bool, padded: bool) -> None:
    (q, v), k = query_and_value(), normal(BATCH, HEADS, SEQ, DIM, seed=3)
    real = padding() if padded else torch.ones(BATCH, SEQ, dtype=torch.bool)
    actual = full_standard_attention(q, k, v, causal=causal, padding_mask=real if padded else None)
    assert_all_close([actual], [standard_by_hand(q, k, v, causal=causal, real=real)], tolerance=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_oneself_has_no_weight_unless_alone(dtype: torch.dtype, scale: float) -> None:
    qk = scale * query_and_value(dtype=dtype)[0]
    weights = full_attention(qk, one_hot_values(SEQ, dtype=dtype))
    own = weights.diagonal(dim1=-2, dim2=-1)
    assert (own[:, :, 0] == 1).all()
    assert (own[:, :, 1:] == 0).all()
    assert (weights.triu(1) == 0).all()
    assert weights.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_real_token_among_padding_attends_to_itself_and_padding_gives_zero(dtype: torch.dtype) -> None:
    real = torch.zeros(BATCH, SEQ, dtype=torch.bool)
    real[:, 7] = True
    qk, v = query_and_value(dtype=dtype)
    for causal in (True, False):
        out = full_attention(qk, v, causal=causal, padding_mask=real)
        assert torch.equal(out[:, :, 7], v[:, :, 7])
        assert (out[:, :, ~real[0]] == 0).all()


@pytest.mark.parametrize("standard", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_content_at_padding_does_not_matter_and_gets_no_gradient(standard: bool, causal: bool) -> None:
    qk, v = query_and_value()
    other_qk, other_v = query_and_value(seed=41)
    where = padding()[:, None, :, None]

    def attention(qk: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if standard:
            return full_standard_attention(qk, -qk, v, causal=causal, padding_mask=padding())
        return full_attention(qk, v, causal=causal, padding_mask=padding())

    actual = value_and_gradients(attention, qk, v)
    changed = value_and_gradients(attention, torch.where(where, qk, other_qk), torch.where(where, v, other_v))
    assert_all_close(changed, actual, tolerance=1e-12)
    for tensor in actual:
        assert (tensor.masked_select(~where) == 0).all()
        assert tensor.isfinite().all()


def test_gradients_pass_finite_differences() -> None:
    qk, v = normal(1, 2, 7, 3, seed=1).requires_grad_(), normal(1, 2, 7, 5, seed=2).requires_grad_()
    real = torch.tensor([[False, True, True, True, False, True, True]])
    assert torch.autograd.gradcheck(lambda qk, v: full_attention(qk, v, padding_mask=real), (qk, v))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_mask", [None, padding()], ids=["whole", "padded"])
def test_narrow_dtypes_stay_near_float64(
    dtype: torch.dtype, causal: bool, padding_mask: torch.Tensor | None
) -> None:
    settings: dict[str, Any] = {"causal": causal, "padding_mask": padding_mask}
    qk, v = query_and_value(dtype=dtype)
    k = normal(BATCH, HEADS, SEQ, DIM, seed=3, dtype=dtype)
    wide_qk, wide_k, wide_v = qk.double(), k.double(), v.double()
    actual = value_and_gradients(full_attention, qk, v, **settings)
    expected = value_and_gradients(reference.full_attention, wide_qk, wide_v, **settings)
    assert_near_float64(actual, expected, dtype=dtype)
    actual = value_and_gradients(full_standard_attention, qk, k, v, **settings)
    expected = value_and_gradients(full_standard_attention, wide_qk, wide_k, wide_v, **settings)
    assert_near_float64(actual, expected, dtype=dtype)


@pytest.mark.parametrize(
    ("attention", "broken_input"),
    [
        (full_attention, 0),
        (full_attention, 1),
        (full_standard_attention, 0),
        (full_standard_attention, 1),
        (full_standard_attention, 2),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_mask", [None, padding()], ids=["whole", "padded"])
def test_nan_in_one_row_passes_through_and_leaves_the_other_rows_alone(
    attention: Callable[..., torch.Tensor],
    broken_input: int,
    causal: bool,
    padding_mask: torch.Tensor | None,
) -> None:
    qk, v = query_and_value()
    inputs = (qk, v) if attention is full_attention else (qk, normal(*qk.shape, seed=3), v)
    settings: dict[str, Any] = {"causal": causal, "padding_mask": padding_mask}
    clean = value_and_gradients(attention, *inputs, **settings)
    inputs[broken_input][1, :, 3] = torch.nan
    broken = value_and_gradients(attention, *inputs, **settings)
    for after, before in zip(broken, clean, strict=True):
        assert torch.equal(after[0], before[0])
    out, query_gradient, *_ = broken
    assert out[1].isnan().any()
    assert query_gradient[1].isnan().any()


@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0)])
def test_an_empty_input_gives_an_empty_output(batch: int, seq: int) -> None:
    qk, v = torch.empty(batch, HEADS, seq, DIM), torch.empty(batch, HEADS, seq, VALUE)
    assert full_attention(qk, v).shape == v.shape
    assert full_standard_attention(qk, qk, v).shape == v.shape


def test_dropout_follows_the_global_stream_and_scales_what_it_keeps() -> None:
    qk, v = query_and_value()[0], one_hot_values(SEQ)
    kept = full_attention(qk, v, causal=False)
    torch.manual_seed(5)
    dropped = full_attention(qk, v, causal=False, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(full_attention(qk, v, causal=False, dropout_p=0.5), dropped)
    share = dropped[kept > 0] / kept[kept > 0]
    assert_all_close([share], [share.round()], tolerance=1e-9)
    assert set(share.round().tolist()) == {0.0, 2.0}


def test_wrong_arguments_are_value_errors_that_name_value_rule_and_mend(unchecked: None) -> None:
    qk, v = query_and_value()
    with pytest.raises(ValueError, match="logit_scale='none': use one of trax, sqrt_d"):
        full_attention(qk, v, logit_scale="none")
    with pytest.raises(
        ValueError, match=r"padding_mask of shape \(29, 2\) .*: give bool \[batch, seq\] = \(2, 29\)"
    ):
        full_attention(qk, v, padding_mask=padding().T)
    with pytest.raises(ValueError, match=r"k of shape \(2, 3, 28, 7\): give the shape of q, \(2, 3, 29, 7\)"):
        full_standard_attention(qk, qk[:, :, :-1], v)
    for attention in (
        full_attention,
        lambda qk, v, dropout_p: full_standard_attention(qk, qk, v, dropout_p=dropout_p),
    ):
        with pytest.raises(ValueError, match=r"dropout_p=1\.5: a share of weights; give 0 ≤ dropout_p < 1"):
            attention(qk, v, dropout_p=1.5)
