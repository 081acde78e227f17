from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import full_attention, oracle_attention
from reformer.attention import reference
from reformer.attention.options import LSHOptions
from reformer.attention.oracle import nearest_alone
from reformer.attention.projection import unit_keys
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
    some_buckets,
    value_and_gradients,
)

PADDING = normal(BATCH, SEQ, seed=5) > -0.5


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_mask", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("logit_scale", ["trax", "sqrt_d"])
@pytest.mark.parametrize("n_keys", [0, 1, 5, SEQ - 1, 100])
def test_it_equals_the_dense_twin(
    causal: bool, padding_mask: Tensor | None, logit_scale: str, n_keys: int
) -> None:
    settings = {
        "n_keys": n_keys,
        "causal": causal,
        "padding_mask": padding_mask,
        "logit_scale": logit_scale,
    }
    actual = value_and_gradients(oracle_attention, *query_and_value(), **settings)
    expected = value_and_gradients(reference.oracle_attention, *query_and_value(), **settings)
    assert_all_close(actual, expected, tolerance=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_mask", [None, PADDING], ids=["whole", "padded"])
def test_with_enough_keys_it_is_full_attention(causal: bool, padding_mask: Tensor | None) -> None:
    qk, v = query_and_value()
    actual = value_and_gradients(
        oracle_attention, qk, v, n_keys=SEQ - 1, causal=causal, padding_mask=padding_mask
    )
    expected = value_and_gradients(full_attention, qk, v, causal=causal, padding_mask=padding_mask)
    assert_all_close(actual, expected, tolerance=1e-12)
    fewer = oracle_attention(qk, v, n_keys=SEQ // 3, causal=causal, padding_mask=padding_mask)
    assert not torch.allclose(fewer, expected[0])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n_keys", [1, 4])
def test_the_visible_keys_are_those_of_largest_logit(causal: bool, n_keys: int) -> None:
    qk, _ = query_and_value()
    weights = oracle_attention(qk, one_hot_values(SEQ), n_keys=n_keys, causal=causal, padding_mask=PADDING)
    logits = qk @ unit_keys(qk).transpose(-1, -2)
    for b in range(BATCH):
        for i in range(SEQ):
            others = [j for j in range(SEQ) if PADDING[b, j] and j != i and (j < i or not causal)]
            for h in range(HEADS):
                best = sorted(others, key=lambda j: -float(logits[b, h, i, j]))[:n_keys]
                seen = weights[b, h, i].nonzero().flatten().tolist()
                wanted = sorted(best) if best else [i]
                assert seen == (wanted if PADDING[b, i] else [])


def test_keys_that_tie_with_the_last_one_are_all_seen() -> None:
    qk = torch.ones(1, 1, 5, DIM, dtype=torch.float64)
    weights = oracle_attention(qk, torch.eye(5, dtype=torch.float64)[None, None], n_keys=1)
    assert_all_close([weights[0, 0, 4]], [torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0])], tolerance=1e-12)


def test_without_keys_every_token_sees_itself() -> None:
    qk, v = query_and_value()
    assert torch.equal(oracle_attention(qk, v, n_keys=0), v)


@pytest.mark.parametrize("n_hashes", [1, 2])
def test_no_hash_reaches_more_of_full_attention_with_as_many_keys(n_hashes: int) -> None:
    options = LSHOptions(n_hashes=n_hashes, chunk_length=3)
    qk, _ = query_and_value()
    mass = full_attention(qk, one_hot_values(SEQ))
    shown = reference.times_shown(
        some_buckets(n_hashes), padding_mask=torch.ones(BATCH, SEQ, dtype=torch.bool), options=options
    )
    best = oracle_attention(qk, one_hot_values(SEQ), n_keys=options.n_keys) > 0
    hashed_mass, oracle_mass = ((mass * (seen > 0)).sum(dim=-1) for seen in (shown, best))
    assert (hashed_mass <= oracle_mass + 1e-12).all()
    assert (hashed_mass < oracle_mass - 1e-3).double().mean() > 0.2


def test_the_past_alone_decides() -> None:
    qk, v = query_and_value()
    other_qk, other_v = query_and_value(seed=41)
    changed = [torch.cat([x[:, :, :17], y[:, :, 17:]], dim=2) for x, y in ((qk, other_qk), (v, other_v))]
    before, after = (oracle_attention(*inputs, n_keys=4)[:, :, :17] for inputs in ((qk, v), changed))
    assert_all_close([after], [before], tolerance=1e-12)


def test_places_are_given_to_keys_that_are_shown_alone() -> None:
    logits = torch.tensor([[[[5.0, 4.0, 3.0, 2.0]]]])
    bias = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    hidden = nearest_alone(logits, bias=bias, n_keys=1).isneginf()
    assert hidden.flatten().tolist() == [True, False, True, True]
    assert nearest_alone(logits, bias=bias, n_keys=0).isneginf().all()


# Among few keys a narrow dtype may choose others that are nearly as near.
@pytest.mark.parametrize(("dtype", "n_keys"), [*((dtype, 100) for dtype in NARROW), (torch.float32, 5)])
@pytest.mark.parametrize("causal", [True, False])
def test_narrow_dtypes_stay_near_the_float64_twin(dtype: torch.dtype, n_keys: int, causal: bool) -> None:
    qk, v = query_and_value(dtype=dtype)
    settings: dict[str, Any] = {"n_keys": n_keys, "causal": causal, "padding_mask": PADDING}
    actual = value_and_gradients(oracle_attention, qk, v, **settings)
    expected = value_and_gradients(reference.oracle_attention, qk.double(), v.double(), **settings)
    assert_near_float64(actual, expected, dtype=dtype)
    assert oracle_attention(qk, v, n_keys=3).isfinite().all()


@pytest.mark.parametrize("broken_input", [0, 1], ids=["qk", "v"])
@pytest.mark.parametrize("causal", [True, False])
def test_nan_in_one_row_passes_through_and_leaves_the_other_rows_alone(
    broken_input: int, causal: bool
) -> None:
    inputs = query_and_value()
    clean = value_and_gradients(oracle_attention, *inputs, n_keys=3, causal=causal)
    inputs[broken_input][1, :, 3] = torch.nan
    broken = value_and_gradients(oracle_attention, *inputs, n_keys=3, causal=causal)
    for after, before in zip(broken, clean, strict=True):
        assert torch.equal(after[0], before[0])
    assert broken[0][1].isnan().any()
    assert broken[1][1].isnan().any()


@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0)])
def test_an_empty_input_gives_an_empty_output(batch: int, seq: int) -> None:
    qk, v = torch.empty(batch, HEADS, seq, DIM), torch.empty(batch, HEADS, seq, VALUE)
    assert oracle_attention(qk, v, n_keys=3).shape == v.shape


def test_wrong_arguments_are_value_errors_that_name_value_rule_and_mend() -> None:
    qk, v = query_and_value()
    with pytest.raises(ValueError, match="n_keys=-1: must be at least 0; use n_keys=0 or more"):
        oracle_attention(qk, v, n_keys=-1)
    with pytest.raises(ValueError, match="logit_scale='none': use one of trax, sqrt_d"):
        oracle_attention(qk, v, n_keys=1, logit_scale="none")
    with pytest.raises(ValueError, match=r"dropout_p=1\.5: a share of weights; give 0 ≤ dropout_p < 1"):
        oracle_attention(qk, v, n_keys=1, dropout_p=1.5)
    long = torch.zeros(1, 1, 4097, 1)
    with pytest.raises(ValueError, match="seq=4097: the oracle holds every pair of at most 4096 tokens; use"):
        oracle_attention(long, long, n_keys=1)
