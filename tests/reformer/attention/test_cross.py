import pytest
import torch
from torch import Tensor

from reformer import cross_attention
from tests.reformer.attention.test_reference import NARROW, assert_near_float64
from tests.reformer.helpers import (
    BATCH,
    DIM,
    HEADS,
    SEQ,
    VALUE,
    assert_all_close,
    normal,
    value_and_gradients,
)

SOURCE = 19
PADDING = normal(BATCH, SOURCE, seed=5) > -0.5


def three(*, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(BATCH, HEADS, SEQ, DIM, dtype=dtype),
        normal(BATCH, HEADS, SOURCE, DIM, seed=1, dtype=dtype),
        normal(BATCH, HEADS, SOURCE, VALUE, seed=2, dtype=dtype),
    )


@pytest.mark.parametrize("padded", [True, False])
def test_it_is_a_softmax_over_the_real_tokens_of_the_source(padded: bool) -> None:
    q, k, v = three()
    real = PADDING if padded else torch.ones_like(PADDING)
    actual = cross_attention(q, k, v, padding_mask=PADDING if padded else None)
    for b in range(BATCH):
        keys, values = k[b][:, real[b]], v[b][:, real[b]]
        expected = (q[b] @ keys.transpose(-1, -2) / DIM**0.5).softmax(dim=-1) @ values
        assert_all_close([actual[b]], [expected], tolerance=1e-12)


def test_content_at_padding_does_not_matter_and_gets_no_gradient() -> None:
    q, *source = three()
    where = PADDING[:, None, :, None]
    others = [torch.where(where, x, normal(*x.shape, seed=41 + i)) for i, x in enumerate(source)]
    actual = value_and_gradients(cross_attention, q, *source, padding_mask=PADDING)
    changed = value_and_gradients(cross_attention, q, *others, padding_mask=PADDING)
    assert_all_close(changed, actual, tolerance=1e-12)
    for gradient in actual[2:]:
        assert (gradient.masked_select(~where) == 0).all()


def test_a_source_of_padding_alone_gives_zeros_and_the_other_rows_are_not_touched() -> None:
    real = PADDING.clone()
    real[1] = False
    found = value_and_gradients(cross_attention, *three(), padding_mask=real)
    assert_all_close([found[0][0]], [cross_attention(*three(), padding_mask=PADDING)[0]], tolerance=1e-12)
    for tensor in found:
        assert (tensor[1] == 0).all()
        assert tensor.isfinite().all()


def test_gradients_pass_finite_differences() -> None:
    inputs = [normal(1, 2, length, width, seed=length) for length, width in ((3, 5), (7, 5), (7, 2))]
    real = torch.tensor([[False, True, True, False, True, True, True]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: cross_attention(q, k, v, padding_mask=real), [x.requires_grad_() for x in inputs]
    )


@pytest.mark.parametrize(("batch", "seq", "source"), [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_nothing_to_look_at_gives_zeros_of_the_right_shape(batch: int, seq: int, source: int) -> None:
    q, k = torch.ones(batch, HEADS, seq, DIM), torch.ones(batch, HEADS, source, DIM)
    v = torch.ones(batch, HEADS, source, VALUE)
    for padding_mask in (None, torch.ones(batch, source, dtype=torch.bool)):
        out = cross_attention(q, k, v, padding_mask=padding_mask)
        assert torch.equal(out, torch.zeros(batch, HEADS, seq, VALUE))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("padding_mask", [None, PADDING], ids=["whole", "padded"])
def test_narrow_dtypes_stay_near_float64(dtype: torch.dtype, padding_mask: Tensor | None) -> None:
    narrow = three(dtype=dtype)
    actual = value_and_gradients(cross_attention, *narrow, padding_mask=padding_mask)
    wide = [x.double() for x in narrow]
    expected = value_and_gradients(cross_attention, *wide, padding_mask=padding_mask)
    assert_near_float64(actual, expected, dtype=dtype)


@pytest.mark.parametrize("broken_input", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("padding_mask", [None, PADDING], ids=["whole", "padded"])
def test_nan_in_one_row_passes_through_and_leaves_the_other_rows_alone(
    broken_input: int, padding_mask: Tensor | None
) -> None:
    inputs = three()
    clean = value_and_gradients(cross_attention, *inputs, padding_mask=padding_mask)
    inputs[broken_input][1, :, 3] = torch.nan
    broken = value_and_gradients(cross_attention, *inputs, padding_mask=padding_mask)
    for after, before in zip(broken, clean, strict=True):
        assert torch.equal(after[0], before[0])
    out, query_gradient, *_ = broken
    assert out[1].isnan().any()
    assert query_gradient[1].isnan().any()


def test_dropout_scales_what_it_keeps() -> None:
    q, k, _ = three()
    v = torch.eye(SOURCE, dtype=torch.float64).expand(BATCH, HEADS, SOURCE, SOURCE)
    share = cross_attention(q, k, v, dropout_p=0.5) / cross_attention(q, k, v)
    assert set(share.round(decimals=9).flatten().tolist()) == {0.0, 2.0}


def test_wrong_arguments_are_value_errors_that_name_value_rule_and_mend(unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"padding_mask of shape \(2, 29\) .*: give bool .* = \(2, 19\)"):
        cross_attention(*three(), padding_mask=torch.ones(BATCH, SEQ, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"dropout_p=1\.5: a share of weights; give 0 ≤ dropout_p < 1"):
        cross_attention(*three(), dropout_p=1.5)
