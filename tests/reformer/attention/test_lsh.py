from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import CrossPolytope, HashFamily, Random, full_attention, lsh_attention
from reformer.attention import reference
from reformer.attention.options import LSHOptions
from reformer.hashing.buckets import LARGEST_COUNT
from tests.reformer.hashing.test_family import FAMILIES
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

CAUSALITIES = ("strict", "bucket", "published")
#: Who sees whom; a strict query never looks across a seam.
MODES: dict[str, dict[str, Any]] = {
    "strict": {"causality": "strict"},
    "bucket": {"causality": "bucket"},
    "published": {"causality": "published"},
    "both ways": {"causal": False},
    "both ways in a bucket": {"causal": False, "bucket_mask": True},
}


def one_bucket(rounds: int, seq: int = SEQ) -> Tensor:
    return torch.zeros(BATCH, HEADS, rounds, seq, dtype=torch.int64)


def scattered_padding(seq: int = SEQ) -> Tensor:
    return normal(BATCH, seq, seed=5) > -0.5


def sparse_padding() -> Tensor:
    """So little that the last chunk of five holds real tokens, which a seam can show."""
    real = torch.ones(BATCH, SEQ, dtype=torch.bool)
    real[0, [0, 11]] = False
    real[1, [0, 1, 17]] = False
    return real


def weights_of(qk: Tensor, **settings: Any) -> Tensor:
    return lsh_attention(qk, one_hot_values(qk.shape[2], dtype=qk.dtype), **settings)


# Full attention as a limit.


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_mask", [None, scattered_padding()], ids=["whole", "padded"])
@pytest.mark.parametrize("logit_scale", ["trax", "sqrt_d"])
def test_one_bucket_one_round_one_chunk_is_full_attention(
    causality: str, causal: bool, padding_mask: Tensor | None, logit_scale: str
) -> None:
    inputs = query_and_value()
    shared: dict[str, Any] = {"causal": causal, "padding_mask": padding_mask, "logit_scale": logit_scale}
    actual = value_and_gradients(
        lsh_attention,
        *inputs,
        n_hashes=1,
        chunk_length=31,
        causality=causality,
        buckets=one_bucket(1),
        **shared,
    )
    assert_all_close(actual, value_and_gradients(full_attention, *inputs, **shared), tolerance=1e-12)


@pytest.mark.parametrize("rounds", [2, 5])
@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_with_count_any_number_of_rounds_is_still_full_attention(mode: str, rounds: int, seams: str) -> None:
    inputs, causal = query_and_value(), MODES[mode].get("causal", True)
    settings: dict[str, Any] = {"n_hashes": rounds, "chunk_length": 31, "seams": seams, **MODES[mode]}
    actual = value_and_gradients(lsh_attention, *inputs, buckets=one_bucket(rounds), **settings)
    assert_all_close(actual, value_and_gradients(full_attention, *inputs, causal=causal), tolerance=1e-12)


@pytest.mark.parametrize("rounds", [2, 5])
@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_with_count_small_chunks_are_full_attention_once_they_look_far_enough(
    mode: str, rounds: int, seams: str
) -> None:
    # One round shows every pair; the others show some of them again.
    buckets = torch.cat([some_buckets(rounds - 1), one_bucket(1)], dim=2)
    inputs, causal = query_and_value(), MODES[mode].get("causal", True)
    settings: dict[str, Any] = {
        "n_hashes": rounds,
        "chunk_length": 5,
        "n_chunks_before": 6,
        "n_chunks_after": None if causal else 6,
        "seams": seams,
        **MODES[mode],
    }
    actual = value_and_gradients(lsh_attention, *inputs, buckets=buckets, **settings)
    assert_all_close(actual, value_and_gradients(full_attention, *inputs, causal=causal), tolerance=1e-12)


def test_with_count_many_rounds_converge_to_full_attention_and_with_sum_they_do_not() -> None:
    qk, v = query_and_value()
    full = full_attention(qk, v)

    def distance(rounds: int, duplicates: str) -> float:
        out = lsh_attention(qk, v, n_hashes=rounds, chunk_length=5, n_buckets=4, duplicates=duplicates)
        return float((out - full).norm() / full.norm())

    assert distance(1, "count") > 0.1
    assert distance(64, "count") < 0.05
    assert distance(64, "sum") > 0.2


# What is visible.


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_token_attends_to_itself_only_when_nothing_else_is_left(
    causality: str, rounds: int, dtype: torch.dtype
) -> None:
    qk, _ = query_and_value(dtype=dtype)
    buckets = some_buckets(rounds, count=7)
    weights = weights_of(qk, n_hashes=rounds, chunk_length=5, causality=causality, buckets=buckets)
    own = weights.diagonal(dim1=-2, dim2=-1)
    others = weights.float().sum(dim=-1) - own
    assert set(own.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(own == 1, others.abs() < 1e-2)
    assert (own[:, :, 0] == 1).all()


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("duplicates", ["count", "sum"])
def test_the_first_token_gives_its_own_value(causality: str, seams: str, duplicates: str) -> None:
    qk, v = query_and_value()
    out = lsh_attention(
        qk,
        v,
        n_hashes=2,
        chunk_length=5,
        n_buckets=4,
        causality=causality,
        seams=seams,
        duplicates=duplicates,
    )
    assert_all_close([out[:, :, 0]], [v[:, :, 0]], tolerance=1e-12)


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("seams", ["masked", "reference"])
def test_causal_weights_never_reach_a_later_position_and_always_sum_to_one(
    causality: str, seams: str
) -> None:
    qk, _ = query_and_value()
    weights = weights_of(qk, n_hashes=5, chunk_length=5, n_buckets=6, causality=causality, seams=seams)
    assert (weights.triu(1) == 0).all()
    assert_all_close([weights.sum(dim=-1)], [torch.ones(BATCH, HEADS, SEQ)], tolerance=1e-12)


def test_bucket_mask_hides_other_buckets_and_its_absence_shows_them() -> None:
    qk, _ = query_and_value()
    buckets = some_buckets(1, count=4)
    same = buckets[:, :, 0, :, None] == buckets[:, :, 0, None, :]
    settings: dict[str, Any] = {"n_hashes": 1, "chunk_length": 5, "causal": False, "buckets": buckets}
    masked = weights_of(qk, bucket_mask=True, **settings)
    assert (masked[~same] == 0).all()
    assert (weights_of(qk, **settings)[~same] > 0).any()


@pytest.mark.parametrize(("mode", "moves"), [("published", True), ("both ways", True), ("bucket", False)])
def test_reference_seams_show_keys_of_another_round_but_not_of_another_bucket(mode: str, moves: bool) -> None:
    qk, _ = query_and_value()
    settings: dict[str, Any] = {
        "n_hashes": 2,
        "chunk_length": 5,
        "buckets": some_buckets(2, count=11),
        "padding_mask": sparse_padding(),
        **MODES[mode],
    }
    masked, reference_seams = (weights_of(qk, seams=seams, **settings) for seams in ("masked", "reference"))
    assert bool(((masked == 0) & (reference_seams > 0.01)).any()) == moves


def test_published_with_a_bucket_mask_is_the_bucket_mode() -> None:
    qk, v = query_and_value()
    settings: dict[str, Any] = {"n_hashes": 2, "chunk_length": 5, "n_buckets": 4}
    a = lsh_attention(qk, v, causality="published", bucket_mask=True, **settings)
    b = lsh_attention(qk, v, causality="bucket", **settings)
    c = lsh_attention(qk, v, causality="published", **settings)
    assert torch.equal(a, b)
    assert not torch.allclose(b, c)


def test_sum_weighs_a_pair_by_the_rounds_that_show_it_and_count_does_not() -> None:
    qk, v = query_and_value()
    settings: dict[str, Any] = {"chunk_length": 5, "causality": "bucket"}
    buckets = some_buckets(2)
    once = lsh_attention(qk, v, n_hashes=2, buckets=buckets, **settings)
    # One round three times: as a set nothing new, as a sum more weight for what that round shows.
    repeated = buckets[:, :, [0, 0, 0, 1]]
    count = lsh_attention(qk, v, n_hashes=4, buckets=repeated, **settings)
    total = lsh_attention(qk, v, n_hashes=4, buckets=repeated, duplicates="sum", **settings)
    assert_all_close([count], [once], tolerance=1e-12)
    assert float((total - once).abs().max()) > 0.05


@pytest.mark.parametrize("logit_scale", ["trax", "sqrt_d"])
def test_logits_are_query_length_times_cosine(logit_scale: str) -> None:
    qk, _ = query_and_value()
    weights = weights_of(
        qk, n_hashes=1, chunk_length=31, causal=False, logit_scale=logit_scale, buckets=one_bucket(1)
    )
    b, h, i, j, k = 1, 2, 5, 11, 23
    lengths = qk[b, h].norm(dim=-1)
    cosine = (qk[b, h, i] @ qk[b, h].T) / (lengths[i] * lengths)
    logits = lengths[i] * cosine / (1 if logit_scale == "trax" else DIM**0.5)
    expected = (logits[j] - logits[k]).exp()
    torch.testing.assert_close(weights[b, h, i, j] / weights[b, h, i, k], expected, rtol=1e-5, atol=0)


# Padding.


@pytest.mark.parametrize("causality", CAUSALITIES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("duplicates", ["count", "sum"])
@pytest.mark.parametrize(
    "at", [(0,), (0, 1), (7, 8, 19), tuple(range(23, 29)), (0, 2, 4, 6, 8, 10, 12, 28)], ids=str
)
def test_padding_anywhere_changes_no_valid_output_or_gradient(
    causality: str, causal: bool, duplicates: str, at: tuple[int, ...]
) -> None:
    padded = SEQ + len(at)
    real = torch.ones(padded, dtype=torch.bool)
    real[[place + index for index, place in enumerate(at)]] = False
    qk, v = query_and_value(padded)
    buckets = some_buckets(2, padded)
    settings: dict[str, Any] = {
        "n_hashes": 2,
        "chunk_length": 5,
        "causality": causality,
        "causal": causal,
        "duplicates": duplicates,
    }
    pull = normal(BATCH, HEADS, padded, VALUE, seed=13)
    compact = pulled(qk[:, :, real], v[:, :, real], pull[:, :, real], buckets=buckets[..., real], **settings)
    spread = pulled(qk, v, pull, buckets=buckets, padding_mask=real.expand(BATCH, padded), **settings)
    assert_all_close([x[:, :, real] for x in spread], compact, tolerance=1e-10)


def pulled(qk: Tensor, v: Tensor, pull: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    """Output and input gradients for a given gradient of the output."""
    leaves = (qk.detach().requires_grad_(), v.detach().requires_grad_())
    out = lsh_attention(*leaves, **settings)
    return (out.detach(), *torch.autograd.grad(out, leaves, pull))


@pytest.mark.parametrize("attention", [lsh_attention, reference.lsh_attention], ids=["fast", "dense"])
@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("real", [scattered_padding(), sparse_padding()], ids=["scattered", "sparse"])
def test_content_at_padding_does_not_matter_and_gets_no_gradient(
    attention: Callable[..., Tensor], seams: str, mode: str, real: Tensor
) -> None:
    qk, v = query_and_value()
    other_qk, other_v = query_and_value(seed=41)
    buckets, other_buckets = some_buckets(2, count=11), some_buckets(2, count=13, seed=41)
    where = real[:, None, :, None]
    settings: dict[str, Any] = {
        "n_hashes": 2,
        "chunk_length": 5,
        "seams": seams,
        "padding_mask": real,
        **MODES[mode],
    }
    actual = value_and_gradients(attention, qk, v, buckets=buckets, **settings)
    changed = value_and_gradients(
        attention,
        torch.where(where, qk, 100 * other_qk),
        torch.where(where, v, 100 * other_v),
        buckets=torch.where(real[:, None, None, :], buckets, other_buckets),
        **settings,
    )
    assert_all_close(changed, actual, tolerance=1e-12)
    for tensor in actual:
        assert (tensor.masked_select(~where) == 0).all()


@pytest.mark.parametrize("attention", [lsh_attention, reference.lsh_attention], ids=["fast", "dense"])
@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize(
    ("family", "mode"),
    [(family, mode) for family in FAMILIES for mode in MODES if family.token_wise or mode != "strict"],
    ids=str,
)
def test_nor_does_it_matter_to_what_is_hashed(
    attention: Callable[..., Tensor], seams: str, family: HashFamily, mode: str
) -> None:
    (qk, v), (other_qk, other_v) = query_and_value(), query_and_value(seed=41)
    real = scattered_padding()
    where = real[:, None, :, None]
    settings: dict[str, Any] = {
        "n_hashes": 5,
        "n_buckets": 8,
        "chunk_length": 4,
        "seams": seams,
        "hashing": family,
        "padding_mask": real,
        **MODES[mode],
    }
    actual = value_and_gradients(attention, qk, v, **settings)
    changed = value_and_gradients(
        attention, torch.where(where, qk, 100 * other_qk), torch.where(where, v, 100 * other_v), **settings
    )
    assert_all_close(changed, actual, tolerance=1e-12)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_padding_behind_is_hashed_as_if_it_were_absent(family: HashFamily, causal: bool) -> None:
    qk, v = query_and_value()
    lengths = (17, 23)
    settings: dict[str, Any] = {
        "n_hashes": 5,
        "n_buckets": 8,
        "chunk_length": 4,
        "causal": causal,
        "causality": "published",
        "hashing": family,
    }
    real = torch.arange(SEQ) < torch.tensor(lengths)[:, None]
    together = lsh_attention(qk, v, padding_mask=real, **settings)
    for row, length in enumerate(lengths):
        alone = lsh_attention(qk[row : row + 1, :, :length], v[row : row + 1, :, :length], **settings)
        assert_all_close([together[row : row + 1, :, :length]], [alone], tolerance=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"causal": True},
        {"causal": False},
        {"causal": False, "hashing": CrossPolytope(data_rotation=True)},
        {"causality": "published", "hashing": CrossPolytope(data_rotation=True)},
    ],
    ids=str,
)
def test_a_row_of_padding_alone_gives_zeros_and_finite_gradients(settings: dict[str, Any]) -> None:
    real = torch.ones(BATCH, SEQ, dtype=torch.bool)
    real[1] = False
    results = value_and_gradients(
        lsh_attention, *query_and_value(), n_hashes=2, chunk_length=5, padding_mask=real, **settings
    )
    for tensor in results:
        assert tensor.isfinite().all()
        assert (tensor[1] == 0).all()
        assert (tensor[0] != 0).any()


# Odd inputs.


@pytest.mark.parametrize("attention", [lsh_attention, reference.lsh_attention], ids=["fast", "dense"])
@pytest.mark.parametrize(("batch", "seq"), [(0, SEQ), (BATCH, 0), (0, 0)])
def test_an_empty_input_gives_an_empty_output(attention: Callable[..., Tensor], batch: int, seq: int) -> None:
    qk = torch.empty(batch, HEADS, seq, DIM, requires_grad=True)
    v = torch.empty(batch, HEADS, seq, VALUE, requires_grad=True)
    out = attention(qk, v, n_hashes=2, chunk_length=5)
    assert out.shape == v.shape
    out.sum().backward()
    assert v.grad is not None


@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("hashing", [CrossPolytope(), Random()], ids=["content", "random"])
@pytest.mark.parametrize("broken_input", [0, 1], ids=["qk", "v"])
def test_nan_in_one_row_passes_through_and_leaves_the_other_rows_alone(
    seams: str, mode: str, hashing: Any, broken_input: int
) -> None:
    inputs = query_and_value()
    settings: dict[str, Any] = {
        "n_hashes": 2,
        "chunk_length": 5,
        "n_buckets": 4,
        "seams": seams,
        "hashing": hashing,
        "max_length": SEQ,
        **MODES[mode],
    }
    clean = value_and_gradients(lsh_attention, *inputs, **settings)
    inputs[broken_input][1, :, 3] = torch.nan
    broken = value_and_gradients(lsh_attention, *inputs, **settings)
    for after, before in zip(broken, clean, strict=True):
        assert torch.equal(after[0], before[0])
    out, qk_gradient, _ = broken
    assert out[1].isnan().any()
    assert qk_gradient[1].isnan().any()


def test_infinite_queries_do_not_leave_the_range_of_buckets() -> None:
    qk, v = query_and_value()
    qk[0, 0, 2], qk[0, 1, 5] = torch.inf, -torch.inf
    out = lsh_attention(qk, v, n_hashes=2, chunk_length=5, n_buckets=(4, 6))
    assert torch.equal(
        out[1], lsh_attention(*query_and_value(), n_hashes=2, chunk_length=5, n_buckets=(4, 6))[1]
    )


def test_zero_queries_attend_evenly_with_finite_gradients() -> None:
    qk, v = query_and_value()
    out, qk_gradient, _ = value_and_gradients(
        lsh_attention, 0 * qk, v, n_hashes=1, chunk_length=31, causal=False, buckets=one_bucket(1)
    )
    others = (v.sum(dim=2, keepdim=True) - v) / (SEQ - 1)
    assert_all_close([out], [others], tolerance=1e-12)
    assert qk_gradient.isfinite().all()


def test_the_same_call_gives_the_same_result_and_leaves_the_global_stream_alone() -> None:
    qk, v = query_and_value()
    before = torch.get_rng_state()
    first = lsh_attention(qk, v, n_hashes=2, chunk_length=5)
    second = lsh_attention(qk, v, n_hashes=2, chunk_length=5)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_generator_gives_another_hash_and_an_equal_one_the_same() -> None:
    qk, v = query_and_value()

    def out(seed: int) -> Tensor:
        return lsh_attention(
            qk, v, n_hashes=1, chunk_length=5, n_buckets=8, generator=torch.Generator().manual_seed(seed)
        )

    assert torch.equal(out(3), out(3))
    assert not torch.allclose(out(3), out(4))
    assert torch.equal(out(0), lsh_attention(qk, v, n_hashes=1, chunk_length=5, n_buckets=8))


def test_max_length_fixes_the_automatic_bucket_count() -> None:
    qk, v = query_and_value()
    settings: dict[str, Any] = {"n_hashes": 1, "chunk_length": 5}
    # 2·(29 // 5) = 10 → 8 buckets; 2·(80 // 5) = 32.
    assert torch.equal(lsh_attention(qk, v, **settings), lsh_attention(qk, v, n_buckets=8, **settings))
    assert torch.equal(
        lsh_attention(qk, v, max_length=80, **settings), lsh_attention(qk, v, n_buckets=32, **settings)
    )
    assert not torch.allclose(
        lsh_attention(qk, v, max_length=80, **settings), lsh_attention(qk, v, **settings)
    )


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    qk, v = query_and_value()
    strided_qk = qk.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3)
    strided_v = torch.cat([v, v], dim=-1).flatten(-2).unflatten(-1, (SEQ, 2 * VALUE))[..., ::1][..., :VALUE]
    real = scattered_padding().T.contiguous().T
    assert not strided_qk.is_contiguous()
    assert not strided_v.is_contiguous()
    assert not real.is_contiguous()
    settings: dict[str, Any] = {"n_hashes": 2, "chunk_length": 5, "buckets": some_buckets(2)}
    assert_all_close(
        value_and_gradients(lsh_attention, strided_qk, strided_v, padding_mask=real, **settings),
        value_and_gradients(lsh_attention, qk, v, padding_mask=real.contiguous(), **settings),
        tolerance=1e-12,
    )


def test_expanded_values_are_accepted() -> None:
    qk, v = query_and_value()
    expanded = v[:, :1].expand(BATCH, HEADS, SEQ, VALUE)
    settings: dict[str, Any] = {"n_hashes": 2, "chunk_length": 5}
    assert torch.equal(
        lsh_attention(qk, expanded, **settings), lsh_attention(qk, expanded.contiguous(), **settings)
    )


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_buckets_of_any_integer_dtype_give_the_same(dtype: torch.dtype) -> None:
    qk, v = query_and_value()
    settings: dict[str, Any] = {"n_hashes": 2, "chunk_length": 5}
    wide = lsh_attention(qk, v, buckets=some_buckets(2), **settings)
    assert torch.equal(lsh_attention(qk, v, buckets=some_buckets(2).to(dtype), **settings), wide)


@pytest.mark.parametrize("causality", ["strict", "bucket", "published"])
@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("shift", [-17, LARGEST_COUNT - 3])
def test_only_the_order_of_bucket_ids_matters(causality: str, seams: str, shift: int) -> None:
    qk, v = query_and_value()
    settings: dict[str, Any] = {
        "n_hashes": 2,
        "chunk_length": 5,
        "causality": causality,
        "seams": seams,
        "n_chunks_after": None if causality == "strict" else 1,
    }
    out = lsh_attention(qk, v, buckets=some_buckets(2), **settings)
    assert torch.equal(lsh_attention(qk, v, buckets=some_buckets(2) + shift, **settings), out)


@pytest.mark.parametrize("causality", ["strict", "bucket"])
@pytest.mark.parametrize("seams", ["masked", "reference"])
def test_bucket_ids_far_apart_stay_apart(causality: str, seams: str) -> None:
    qk, v = query_and_value()
    settings: dict[str, Any] = {"n_hashes": 2, "chunk_length": 3, "causality": causality, "seams": seams}
    settings["n_chunks_after"] = None if causality == "strict" else 2
    near = some_buckets(2, count=2)
    # Four times the distance is 2³²: nothing, if it were computed in 32 bits.
    far = lsh_attention(qk, v, buckets=near * 2**30, **settings)
    assert torch.equal(far, lsh_attention(qk, v, buckets=near, **settings))


# Gradients, dropout, errors.


@pytest.mark.parametrize("duplicates", ["count", "sum"])
@pytest.mark.parametrize(
    ("mode", "seams"),
    [
        ("strict", "masked"),
        *(
            (mode, seams)
            for mode in ("bucket", "published", "both ways")
            for seams in ("masked", "reference")
        ),
    ],
)
def test_gradients_pass_finite_differences_through_sort_and_gather(
    mode: str, seams: str, duplicates: str
) -> None:
    seq = 11
    qk, v = normal(2, 1, seq, 5, seed=1).requires_grad_(), normal(2, 1, seq, 2, seed=2).requires_grad_()
    # Little padding: the last chunk of four holds real tokens, for the seams to show.
    real = torch.ones(2, seq, dtype=torch.bool)
    real[0, 0] = False
    real[1, [0, 4]] = False
    buckets = some_buckets(3, seq, count=5, seed=2)[:, :1]

    def function(qk: Tensor, v: Tensor, seams: str = seams) -> Tensor:
        return lsh_attention(
            qk,
            v,
            n_hashes=3,
            chunk_length=4,
            duplicates=duplicates,
            seams=seams,
            buckets=buckets,
            padding_mask=real,
            **MODES[mode],
        )

    show_nothing = torch.allclose(function(qk, v, seams="masked"), function(qk, v, seams="reference"))
    assert show_nothing == (mode not in ("published", "both ways"))
    assert torch.autograd.gradcheck(function, (qk, v))


def test_second_derivatives_pass_finite_differences() -> None:
    qk, v = normal(1, 1, 7, 3, seed=1).requires_grad_(), normal(1, 1, 7, 2, seed=2).requires_grad_()
    buckets = some_buckets(2, 7, count=2)[:1, :1]

    def function(qk: Tensor, v: Tensor) -> Tensor:
        return lsh_attention(qk, v, n_hashes=2, chunk_length=3, buckets=buckets)

    assert torch.autograd.gradgradcheck(function, (qk, v))


def test_hashing_passes_no_gradient_and_values_alone_may_need_one() -> None:
    qk, v = query_and_value()
    out = lsh_attention(qk, v.requires_grad_(), n_hashes=2, chunk_length=5)
    (gradient,) = torch.autograd.grad(out.sum(), [v])
    assert_all_close([gradient.sum()], [torch.tensor(float(out.numel()))], tolerance=1e-10)


@pytest.mark.parametrize("duplicates", ["count", "sum"])
def test_attention_dropout_keeps_the_mean_and_follows_the_global_stream(duplicates: str) -> None:
    qk, _ = query_and_value()
    v = one_hot_values(SEQ)
    settings: dict[str, Any] = {
        "n_hashes": 2,
        "chunk_length": 5,
        "buckets": some_buckets(2),
        "duplicates": duplicates,
    }
    kept = lsh_attention(qk, v, **settings)
    torch.manual_seed(3)
    draws = [lsh_attention(qk, v, dropout_p=0.25, **settings) for _ in range(400)]
    torch.manual_seed(3)
    assert torch.equal(lsh_attention(qk, v, dropout_p=0.25, **settings), draws[0])
    mean = torch.stack(draws).mean(dim=0)
    # Standard error of a mean of 400 weights w/(1−p) or 0: w·√(p/(1−p)/400) ≤ 0.029.
    assert float((mean - kept).abs().max()) < 5 * 0.029
    assert_all_close([mean.sum(dim=-1).mean()], [torch.ones(())], tolerance=0.01)


def test_with_count_a_pair_is_dropped_whole_whatever_rounds_show_it() -> None:
    qk, _ = query_and_value()
    settings: dict[str, Any] = {"n_hashes": 5, "chunk_length": 31, "buckets": one_bucket(5)}
    kept = lsh_attention(qk, one_hot_values(SEQ), **settings)
    dropped = lsh_attention(qk, one_hot_values(SEQ), dropout_p=0.5, **settings)
    share = dropped[kept > 0] / kept[kept > 0]
    assert_all_close([share.round()], [share], tolerance=1e-10)
    assert set(share.round().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_so_is_a_pair_that_some_of_the_rounds_and_seams_show(mode: str, seams: str) -> None:
    qk, _ = query_and_value()
    buckets, real = some_buckets(5), sparse_padding()
    shape: dict[str, Any] = {"n_hashes": 5, "chunk_length": 5, "seams": seams, **MODES[mode]}
    shown = reference.times_shown(buckets, padding_mask=real, options=LSHOptions(**shape))
    assert {0, 1, 2, 3} <= set(shown.unique().tolist())

    def shares(duplicates: str) -> Tensor:
        """What dropout of a quarter makes of each weight."""
        settings = shape | {"duplicates": duplicates, "buckets": buckets, "padding_mask": real}
        kept, dropped = (weights_of(qk, dropout_p=p, **settings) for p in (0.0, 0.25))
        assert (dropped[kept == 0] == 0).all()
        return dropped[kept > 0] / kept[kept > 0]

    assert set(shares("count").round(decimals=9).tolist()) == {0.0, round(4 / 3, 9)}
    # A sum is dropped window by window, which shows that these are pairs that could be dropped in part.
    assert len(shares("sum").round(decimals=9).unique()) > 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_hashes": 0}, r"n_hashes=0: must be at least 1; use n_hashes=1"),
        ({"chunk_length": 0}, r"chunk_length=0: must be at least 1; use chunk_length=1"),
        ({"n_buckets": 3}, r"n_buckets=3: it must be an even number ≥ 2 .*; use 4 or None"),
        ({"n_buckets": 0}, r"n_buckets=0: .*; use 2 or None"),
        ({"n_buckets": -4}, r"n_buckets=-4: .*; use 2 or None"),
        ({"n_buckets": (4, 3)}, r"n_buckets=\(4, 3\): each factor must be an even number ≥ 2 .*; use"),
        ({"n_buckets": ()}, r"n_buckets=\(\): .*; use"),
        ({"n_buckets": 2**31}, r"n_buckets=2147483648: more than 2147483646 buckets; use fewer"),
        (
            {"n_buckets": (2**16, 2**16)},
            r"n_buckets=\(65536, 65536\): more than 2147483646 buckets; use fewer",
        ),
        ({"max_length": 0}, r"max_length=0: must be at least 1; use max_length=1"),
    ],
)
def test_a_wrong_setting_is_a_value_error_that_names_value_rule_and_mend(
    settings: dict[str, Any], says: str, unchecked: None
) -> None:
    qk, v = query_and_value()
    with pytest.raises(ValueError, match=says):
        lsh_attention(qk, v, **({"n_hashes": 2, "chunk_length": 5} | settings))


def test_more_tokens_than_an_index_can_name_is_a_value_error() -> None:
    many = torch.zeros(1, 1, 1, 1).expand(1, 1, 2**31, 1)
    with pytest.raises(ValueError, match=r"seq=2147483648: more than 2147483646 tokens; use shorter"):
        lsh_attention(many, many, n_hashes=1, chunk_length=64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qk": (BATCH, SEQ, DIM)}, r"qk of shape \(2, 29, 7\).*give \[batch, heads, seq, dim\]"),
        (
            {"v": (BATCH, HEADS, 23, VALUE)},
            r"v of \(2, 3, 23, 11\): batch, heads and seq differ; give v of \(2, 3, 29, 11\)",
        ),
        ({"buckets": (BATCH, HEADS, 1, SEQ)}, r"buckets of shape \(2, 3, 1, 29\): give .* = \(2, 3, 2, 29\)"),
        (
            {"padding_mask": (1, SEQ)},
            r"padding_mask of shape \(1, 29\) .*give bool \[batch, seq\] = \(2, 29\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_a_value_error_that_names_their_shapes(
    change: dict[str, tuple[int, ...]], says: str, unchecked: None
) -> None:
    qk, v = query_and_value()
    tensors: dict[str, Any] = {"qk": qk, "v": v}
    for name, shape in change.items():
        dtype = {"buckets": torch.int64, "padding_mask": torch.bool}.get(name, torch.float64)
        tensors[name] = torch.zeros(shape, dtype=dtype)
    with pytest.raises(ValueError, match=says):
        lsh_attention(n_hashes=2, chunk_length=5, **tensors)


def test_a_padding_mask_of_numbers_is_a_value_error(unchecked: None) -> None:
    qk, v = query_and_value()
    with pytest.raises(ValueError, match=r"padding_mask of shape \(2, 29\) and torch.int64: give bool"):
        lsh_attention(
            qk, v, n_hashes=2, chunk_length=5, padding_mask=torch.ones(BATCH, SEQ, dtype=torch.int64)
        )
