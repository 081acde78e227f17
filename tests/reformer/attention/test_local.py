from typing import Any

import pytest
import torch

from reformer import full_standard_attention, local_attention
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


def three() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, v = query_and_value()
    return q, normal(BATCH, HEADS, SEQ, DIM, seed=3), v


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("chunk_length", "look"), [(31, 0), (29, 1), (5, 5)])
def test_windows_over_everything_are_standard_attention(causal: bool, chunk_length: int, look: int) -> None:
    actual = value_and_gradients(
        local_attention,
        *three(),
        chunk_length=chunk_length,
        n_chunks_before=look,
        n_chunks_after=look,
        causal=causal,
    )
    expected = value_and_gradients(full_standard_attention, *three(), causal=causal)
    assert_all_close(actual, expected, tolerance=1e-12)


def test_a_window_is_the_own_chunk_and_its_neighbours_and_ends_do_not_wrap() -> None:
    q, k, _ = three()
    weights = local_attention(
        q, k, one_hot_values(SEQ), chunk_length=5, n_chunks_before=1, n_chunks_after=2, causal=False
    )
    shown = weights[0, 0] > 0
    chunk = torch.arange(SEQ) // 5
    distance = chunk[:, None] - chunk[None, :]
    assert torch.equal(shown, (distance <= 1) & (distance >= -2))


def test_oneself_is_an_ordinary_key() -> None:
    q, k, _ = three()
    weights = local_attention(q, k, one_hot_values(SEQ), chunk_length=5)
    assert (weights.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_gives_zero_and_its_content_does_not_matter(causal: bool) -> None:
    real = normal(BATCH, SEQ, seed=5) > -0.5
    where = real[:, None, :, None]
    inputs = three()
    others = [normal(*x.shape, seed=41 + i) for i, x in enumerate(inputs)]
    settings: dict[str, Any] = {"chunk_length": 5, "causal": causal, "padding_mask": real}
    actual = value_and_gradients(local_attention, *inputs, **settings)
    changed = value_and_gradients(
        local_attention, *(torch.where(where, x, y) for x, y in zip(inputs, others, strict=True)), **settings
    )
    assert_all_close(changed, actual, tolerance=1e-12)
    for tensor in actual:
        assert (tensor.masked_select(~where) == 0).all()
        assert tensor.isfinite().all()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_narrow_dtypes_stay_near_the_float64_twin(dtype: torch.dtype, causal: bool) -> None:
    narrow = [x.to(dtype) for x in three()]
    settings: dict[str, Any] = {
        "chunk_length": 5,
        "causal": causal,
        "padding_mask": normal(BATCH, SEQ, seed=5) > -0.5,
    }
    actual = value_and_gradients(local_attention, *narrow, **settings)
    wide = [x.double() for x in narrow]
    expected = value_and_gradients(reference.local_attention, *wide, **settings)
    assert_near_float64(actual, expected, dtype=dtype)


def test_a_window_that_wraps_shows_a_chunk_as_often_as_it_is_a_neighbour() -> None:
    q, k, _ = three()
    settings: dict[str, Any] = {"chunk_length": 13, "causal": False, "wraps": True}
    # Three chunks: the one before the first is the last, which is also the second one after it.
    weights = local_attention(q, k, one_hot_values(SEQ), n_chunks_before=1, n_chunks_after=2, **settings)
    once = torch.exp(q @ k.transpose(-1, -2) / DIM**0.5)
    chunk = torch.arange(SEQ) // 13
    twice = once * (1 + ((chunk[None, :] - chunk[:, None]) % 3 == 2))
    assert_all_close([weights], [twice / twice.sum(dim=-1, keepdim=True)], tolerance=1e-12)


@pytest.mark.parametrize("wraps", [False, True])
def test_dropout_follows_the_global_stream_and_scales_what_it_keeps(wraps: bool) -> None:
    q, k, _ = three()
    settings: dict[str, Any] = {"chunk_length": 5, "causal": False, "wraps": wraps}
    kept = local_attention(q, k, one_hot_values(SEQ), **settings)
    torch.manual_seed(5)
    dropped = local_attention(q, k, one_hot_values(SEQ), dropout_p=0.25, **settings)
    following = local_attention(q, k, one_hot_values(SEQ), dropout_p=0.25, **settings)
    torch.manual_seed(5)
    assert torch.equal(local_attention(q, k, one_hot_values(SEQ), dropout_p=0.25, **settings), dropped)
    assert not torch.equal(following, dropped)
    share = dropped[kept > 0] / kept[kept > 0]
    assert_all_close([share], [(share > 0).double() / 0.75], tolerance=1e-12)
    # Four standard errors.
    assert float((share == 0).double().mean()) == pytest.approx(0.25, abs=4 * (0.1875 / len(share)) ** 0.5)


@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0)])
def test_an_empty_input_gives_an_empty_output(batch: int, seq: int) -> None:
    q, v = torch.empty(batch, HEADS, seq, DIM), torch.empty(batch, HEADS, seq, VALUE)
    assert local_attention(q, q, v, chunk_length=5).shape == v.shape


@pytest.mark.parametrize("broken_input", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_in_one_row_passes_through_and_leaves_the_other_rows_alone(
    broken_input: int, causal: bool
) -> None:
    inputs = three()
    clean = value_and_gradients(local_attention, *inputs, chunk_length=5, causal=causal)
    inputs[broken_input][1, :, 3] = torch.nan
    broken = value_and_gradients(local_attention, *inputs, chunk_length=5, causal=causal)
    for after, before in zip(broken, clean, strict=True):
        assert torch.equal(after[0], before[0])
    out, query_gradient, *_ = broken
    assert out[1].isnan().any()
    assert query_gradient[1].isnan().any()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"chunk_length": 0}, "chunk_length=0: must be at least 1; use chunk_length=1 or more"),
        ({"n_chunks_before": -1}, "n_chunks_before=-1: must be at least 0; use n_chunks_before=0 or more"),
        ({"n_chunks_after": -1}, "n_chunks_after=-1: must be at least 0; use n_chunks_after=0 or more"),
        ({"dropout_p": 1.5}, "dropout_p=1.5: a share of weights; give 0 ≤ dropout_p < 1"),
    ],
)
def test_a_wrong_setting_is_a_value_error_that_names_value_rule_and_mend(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        local_attention(*three(), **({"chunk_length": 5} | settings))


def test_keys_of_another_shape_are_a_value_error(unchecked: None) -> None:
    q, k, v = three()
    with pytest.raises(ValueError, match=r"k of shape \(2, 3, 28, 7\): give the shape of q, \(2, 3, 29, 7\)"):
        local_attention(q, k[:, :, :-1], v, chunk_length=5)
