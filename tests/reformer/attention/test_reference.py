"""The fast paths against their dense twins, and the twins against derivations of their own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from reformer import CrossPolytope, Hyperplane, Random, full_attention, local_attention, lsh_attention
from reformer.attention import reference
from tests.reformer.helpers import (
    BATCH,
    HEADS,
    SEQ,
    assert_all_close,
    normal,
    one_hot_values,
    pairwise,
    query_and_value,
    some_buckets,
    value_and_gradients,
)

PADDINGS = ("none", "first tokens", "last tokens", "scattered", "whole row")
FACTORS: dict[str, tuple[Any, ...]] = {
    "causal": (True, False),
    "causality": ("strict", "bucket", "published"),
    "duplicates": ("count", "sum"),
    "seams": ("masked", "reference"),
    "bucket_mask": (None, False, True),
    "n_chunks_before": (0, 1, 2, 3),
    "n_chunks_after": (None, 0, 1, 2),
    "padding": PADDINGS,
    "lengths": ((29, 5), (28, 7), (11, 17), (23, 3), (19, 1)),
    "n_hashes": (1, 2, 5),
    "n_buckets": (None, 2, 6, 16, (2, 4), (8, 4)),
    "logit_scale": ("trax", "sqrt_d"),
    "hashing": (CrossPolytope(), Hyperplane(), Random()),
}


def allowed(row: dict[str, Any]) -> bool:
    strict = row["causal"] and row["causality"] == "strict"
    if strict and (row["n_chunks_before"] == 0 or row["n_chunks_after"] not in (None, 0)):
        return False
    if row["causal"] and row["causality"] != "published" and row["bucket_mask"] is False:
        return False
    return not (isinstance(row["hashing"], Hyperplane) and row["n_buckets"] == 6)


def padding_of(kind: str, seq: int) -> Tensor | None:
    real = torch.ones(BATCH, seq, dtype=torch.bool)
    if kind == "none":
        return None
    if kind == "first tokens":
        real[0, :2] = False
    if kind == "last tokens":
        real[1, -3:] = False
    if kind == "scattered":
        real = normal(BATCH, seq, seed=5) > -0.5
    if kind == "whole row":
        real[1] = False
    return real


def assert_fast_equals_dense(row: dict[str, Any]) -> None:
    settings = dict(row)
    seq, settings["chunk_length"] = settings.pop("lengths")
    settings["padding_mask"] = padding_of(settings.pop("padding"), seq)
    inputs = query_and_value(seq)
    assert_all_close(
        value_and_gradients(lsh_attention, *inputs, **settings),
        value_and_gradients(reference.lsh_attention, *inputs, **settings),
        tolerance=1e-10,
    )


@pytest.mark.parametrize("row", pairwise(FACTORS, allowed=allowed))
def test_lsh_attention_and_its_gradients_equal_the_dense_twin(row: dict[str, Any]) -> None:
    assert_fast_equals_dense(row)


@hypothesis_settings(max_examples=300)
@given(
    st.fixed_dictionaries({name: st.sampled_from(levels) for name, levels in FACTORS.items()}).filter(allowed)
)
def test_lsh_attention_equals_the_dense_twin_in_any_combination(row: dict[str, Any]) -> None:
    assert_fast_equals_dense(row)


@pytest.mark.slow
@hypothesis_settings(max_examples=1500)
@given(
    st.fixed_dictionaries({name: st.sampled_from(levels) for name, levels in FACTORS.items()}).filter(allowed)
)
def test_lsh_attention_equals_the_dense_twin_in_many_combinations(row: dict[str, Any]) -> None:
    assert_fast_equals_dense(row)


@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("duplicates", ["count", "sum"])
@pytest.mark.parametrize("n_hashes", [1, 2])
def test_one_bucket_wraps_around_a_single_round_as_the_dense_twin_says(
    seams: str, duplicates: str, n_hashes: int
) -> None:
    settings: dict[str, Any] = {
        "n_hashes": n_hashes,
        "chunk_length": 5,
        "causal": False,
        "bucket_mask": True,
        "seams": seams,
        "duplicates": duplicates,
        "buckets": torch.zeros(BATCH, HEADS, n_hashes, SEQ, dtype=torch.int64),
    }
    inputs = query_and_value()
    assert_all_close(
        value_and_gradients(lsh_attention, *inputs, **settings),
        value_and_gradients(reference.lsh_attention, *inputs, **settings),
        tolerance=1e-10,
    )


#: How far values and gradients may be from those of float64 on the same numbers.
NARROW = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def assert_near_float64(actual: Sequence[Tensor], expected: Sequence[Tensor], *, dtype: torch.dtype) -> None:
    """In this dtype, and as near as it allows, in size and in direction."""
    assert {x.dtype for x in actual} == {dtype}
    assert_all_close(actual, expected, tolerance=NARROW[dtype])
    for a, b in zip(actual, expected, strict=True):
        assert F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0) >= 0.999


# Scattered padding fills the last chunk of every round, with which a seam shows nothing.
@pytest.mark.parametrize("padding", ["first tokens", "scattered"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("causality", ["strict", "bucket", "published", None])
@pytest.mark.parametrize("duplicates", ["count", "sum"])
@pytest.mark.parametrize("seams", ["masked", "reference"])
def test_narrow_dtypes_stay_near_the_float64_twin(
    padding: str, dtype: torch.dtype, causality: str | None, duplicates: str, seams: str
) -> None:
    narrow = query_and_value(dtype=dtype)
    settings: dict[str, Any] = {
        "n_hashes": 2,
        "chunk_length": 5,
        "causal": causality is not None,
        "causality": causality or "published",
        "duplicates": duplicates,
        "seams": seams,
        "buckets": some_buckets(2, count=11),
        "padding_mask": padding_of(padding, SEQ),
    }
    actual = value_and_gradients(lsh_attention, *narrow, **settings)
    wide = [x.double() for x in narrow]
    expected = value_and_gradients(reference.lsh_attention, *wide, **settings)
    assert_near_float64(actual, expected, dtype=dtype)


# A second derivation of each causality: the strict set by looking back token by token, the published windows
# by rolling chunks as the published implementations do.


def unit(x: Tensor) -> Tensor:
    """Rows at unit length; the ε of the implementations under test is 1e-6 of the mean square."""
    return x / (x.square().sum(dim=-1) + 1e-6 * x.shape[-1]).sqrt().unsqueeze(-1)


def softmax_over_sets(qk: Tensor, v: Tensor, visible: list[list[list[list[int]]]]) -> Tensor:
    """Attention over a list of keys for each [batch][head][query]: oneself if alone, else the others."""
    out = torch.zeros_like(v)
    for b, heads in enumerate(visible):
        for h, queries in enumerate(heads):
            for i, keys in enumerate(queries):
                others = [j for j in keys if j != i]
                if others:
                    logits = (unit(qk[b, h, others]) * qk[b, h, i]).sum(dim=-1)
                    out[b, h, i] = logits.softmax(dim=0) @ v[b, h, others]
                elif keys:
                    out[b, h, i] = v[b, h, i]
    return out


def strict_sets(buckets: Tensor, *, reach: int, real: Tensor) -> list[list[list[list[int]]]]:
    """The last `reach` real tokens of a token's bucket before it in any round, and the token itself."""
    batch, heads, rounds, seq = buckets.shape
    sets: list[list[list[list[int]]]] = []
    for b in range(batch):
        sets.append([])
        for h in range(heads):
            sets[-1].append([])
            for i in range(seq):
                seen: set[int] = set()
                for r in range(rounds):
                    ids = buckets[b, h, r].tolist()
                    same = [j for j in range(i) if real[b, j] and ids[j] == ids[i]]
                    seen.update([*same[-reach:], i])
                sets[-1][-1].append(sorted(seen) if real[b, i] else [])
    return sets


@pytest.mark.parametrize("attention", [lsh_attention, reference.lsh_attention], ids=["fast", "dense"])
@pytest.mark.parametrize(
    ("seq", "chunk_length", "n_chunks_before"), [(29, 5, 1), (28, 7, 1), (23, 3, 2), (29, 2, 3), (11, 17, 1)]
)
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("padding", ["none", "first tokens", "scattered", "whole row"])
def test_strict_sees_itself_and_the_last_tokens_of_its_bucket(
    attention: Any, seq: int, chunk_length: int, n_chunks_before: int, rounds: int, padding: str
) -> None:
    qk, v = query_and_value(seq)
    buckets = some_buckets(rounds, seq, count=3)
    mask = padding_of(padding, seq)
    real = torch.ones(BATCH, seq, dtype=torch.bool) if mask is None else mask
    expected = softmax_over_sets(qk, v, strict_sets(buckets, reach=n_chunks_before * chunk_length, real=real))
    actual = attention(
        qk,
        v,
        n_hashes=rounds,
        chunk_length=chunk_length,
        n_chunks_before=n_chunks_before,
        buckets=buckets,
        padding_mask=mask,
    )
    assert_all_close([actual], [expected], tolerance=1e-12)


def rolled_attention(
    qk: Tensor, v: Tensor, buckets: Tensor, *, chunk: int, before: int, after: int, causal: bool
) -> Tensor:
    """Chunks of all rounds in one row, rolled past each other; every slot of a window counts."""
    batch, heads, _, seq = buckets.shape
    order = (buckets * seq + torch.arange(seq)).argsort(dim=-1)
    place = order.argsort(dim=-1)
    position = order.reshape(batch, heads, -1, chunk)

    def rows(x: Tensor) -> Tensor:
        flat = order.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
        return x.gather(2, flat).reshape(batch, heads, -1, chunk, x.shape[-1])

    def window(x: Tensor) -> Tensor:
        return torch.cat([x.roll(shift, dims=2) for shift in range(before, -after - 1, -1)], dim=3)

    logits = rows(qk) @ window(rows(unit(qk))).transpose(-1, -2)
    key_position = window(position).unsqueeze(-2)
    if causal:
        logits = logits.masked_fill(key_position > position.unsqueeze(-1), -1e9)
    logits = logits.masked_fill(key_position == position.unsqueeze(-1), -1e5)
    total = logits.logsumexp(dim=-1, keepdim=True)
    out = (logits - total).exp() @ window(rows(v))

    def back(x: Tensor) -> Tensor:
        x = x.reshape(*buckets.shape, x.shape[-1])
        return x.gather(3, place.unsqueeze(-1).expand(-1, -1, -1, -1, x.shape[-1]))

    return (back(out) * back(total).softmax(dim=2)).sum(dim=2)


@pytest.mark.parametrize("attention", [lsh_attention, reference.lsh_attention], ids=["fast", "dense"])
@pytest.mark.parametrize(("before", "after"), [(1, 0), (2, 0), (1, 1), (0, 2)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_published_with_reference_seams_is_what_rolling_all_chunks_gives(
    attention: Any, before: int, after: int, causal: bool, rounds: int
) -> None:
    qk, v = query_and_value(28)
    buckets = some_buckets(rounds, 28, count=4)
    actual = attention(
        qk,
        v,
        n_hashes=rounds,
        chunk_length=7,
        causal=causal,
        causality="published",
        duplicates="sum",
        seams="reference",
        n_chunks_before=before,
        n_chunks_after=after,
        buckets=buckets,
    )
    expected = rolled_attention(qk, v, buckets, chunk=7, before=before, after=after, causal=causal)
    # A token that sees itself in two slots adds logits near −1e5, whose rounding is 1e-11.
    assert_all_close([actual], [expected], tolerance=1e-10)


@pytest.mark.parametrize("causality", ["strict", "bucket", "published"])
@pytest.mark.parametrize("duplicates", ["count", "sum"])
def test_rounds_together_see_what_each_sees_alone(causality: str, duplicates: str) -> None:
    qk, v = query_and_value()
    buckets = some_buckets(5)
    settings: dict[str, Any] = {"chunk_length": 5, "causality": causality}
    shown = torch.zeros(BATCH, HEADS, SEQ, SEQ, dtype=torch.int64)
    for r in range(5):
        alone = lsh_attention(
            qk, one_hot_values(SEQ), n_hashes=1, buckets=buckets[:, :, r : r + 1], **settings
        )
        shown += alone > 0
    if duplicates == "count":
        # `sum` would weigh a pair by the rounds that show it.
        shown = shown.clamp(max=1)
    logits = qk @ unit(qk).transpose(-1, -2)
    weights = logits.exp() * shown * (1 - torch.eye(SEQ))
    alone_with_itself = weights.sum(dim=-1, keepdim=True) == 0
    weights = torch.where(alone_with_itself, torch.eye(SEQ, dtype=torch.float64), weights)
    expected = weights / weights.sum(dim=-1, keepdim=True) @ v
    actual = lsh_attention(qk, v, n_hashes=5, buckets=buckets, duplicates=duplicates, **settings)
    assert_all_close([actual], [expected], tolerance=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("logit_scale", ["trax", "sqrt_d"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_full_attention_and_its_gradients_equal_the_dense_twin(
    causal: bool, logit_scale: str, padding: str
) -> None:
    inputs = query_and_value()
    settings: dict[str, Any] = {
        "causal": causal,
        "logit_scale": logit_scale,
        "padding_mask": padding_of(padding, SEQ),
    }
    assert_all_close(
        value_and_gradients(full_attention, *inputs, **settings),
        value_and_gradients(reference.full_attention, *inputs, **settings),
        tolerance=1e-10,
    )


LOCAL_FACTORS: dict[str, tuple[Any, ...]] = {
    "causal": (True, False),
    "n_chunks_before": (0, 1, 3),
    "n_chunks_after": (None, 0, 1, 2),
    "padding": PADDINGS,
    "lengths": ((29, 5), (28, 7), (11, 17), (19, 1), (13, 7)),
    "wraps": (False, True),
}


@pytest.mark.parametrize("row", pairwise(LOCAL_FACTORS))
def test_local_attention_and_its_gradients_equal_the_dense_twin(row: dict[str, Any]) -> None:
    settings = dict(row)
    seq, settings["chunk_length"] = settings.pop("lengths")
    settings["padding_mask"] = padding_of(settings.pop("padding"), seq)
    q, v = query_and_value(seq)
    inputs = (q, normal(*q.shape, seed=3), v)
    assert_all_close(
        value_and_gradients(local_attention, *inputs, **settings),
        value_and_gradients(reference.local_attention, *inputs, **settings),
        tolerance=1e-10,
    )
