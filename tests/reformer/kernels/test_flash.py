"""The tiled path, held to the dense twin and to the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.probes import CpuAllocator
from reformer import lsh_attention
from reformer.attention import reference
from reformer.kernels import flash
from tests.reformer.helpers import assert_all_close, pairwise, value_and_gradients

BATCH, HEADS, DIM, VALUE = 2, 3, 7, 11
FACTORS: dict[str, tuple[Any, ...]] = {
    "mode": ("strict", "published", "both ways"),
    "duplicates": ("count", "sum"),
    "n_hashes": (1, 2, 5),
    "seq": (1, 4, 5, 29, 40),
    "padding": ("none", "scattered", "a whole row"),
    "n_chunks_before": (1, 2),
    "n_chunks_after": (0, 1),
    "logit_scale": ("trax", "sqrt_d"),
    "layout": ("heads first", "heads last"),
    "pairs": (1, 120, flash.PAIRS),
    "rows": (1, 60, flash.ROWS),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def inputs(
    row: dict[str, Any], *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    random = torch.Generator().manual_seed(5)
    seq, rounds = row["seq"], row["n_hashes"]

    def normal(dim: int) -> Tensor:
        if row["layout"] == "heads first":
            x = torch.randn(BATCH, HEADS, seq, dim, generator=random)
        else:
            x = torch.randn(BATCH, seq, HEADS, dim, generator=random).transpose(1, 2)
        return x.to(dtype).requires_grad_()

    real = torch.ones(BATCH, seq, dtype=torch.bool)
    if row["padding"] == "scattered":
        real = torch.rand(BATCH, seq, generator=random) < 0.7
    elif row["padding"] == "a whole row":
        real[1] = False
    settings: dict[str, Any] = {
        "buckets": torch.randint(4, (BATCH, HEADS, rounds, seq), generator=random),
        "padding_mask": None if row["padding"] == "none" else real,
        "n_hashes": rounds,
        "chunk_length": 5,
        "duplicates": row["duplicates"],
        "n_chunks_before": row["n_chunks_before"],
        "logit_scale": row["logit_scale"],
        "causal": row["mode"] != "both ways",
        "causality": "published" if row["mode"] == "both ways" else row["mode"],
    }
    if row["mode"] != "strict":
        settings["n_chunks_after"] = row["n_chunks_after"]
    return normal(DIM), normal(VALUE), settings


@pytest.mark.parametrize("row", pairwise(FACTORS))
def test_values_and_gradients_are_those_of_the_dense_twin(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "PAIRS", row["pairs"])
    monkeypatch.setattr(flash, "ROWS", row["rows"])
    qk, v, settings = inputs(row)
    expected = value_and_gradients(reference.lsh_attention, qk, v, **settings)
    assert_all_close(
        value_and_gradients(lsh_attention, qk, v, backend="flash", **settings), expected, tolerance=1e-12
    )


ROW: dict[str, Any] = {name: levels[-1] for name, levels in FACTORS.items()} | {"padding": "scattered"}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", FACTORS["mode"])
@pytest.mark.parametrize("duplicates", FACTORS["duplicates"])
def test_narrow_types_stay_near_the_twin_in_float64(mode: str, duplicates: str, dtype: torch.dtype) -> None:
    qk, v, settings = inputs({**ROW, "mode": mode, "duplicates": duplicates}, dtype=dtype)
    wide = [x.detach().double().requires_grad_() for x in (qk, v)]
    expected = value_and_gradients(reference.lsh_attention, *wide, **settings)
    found = value_and_gradients(lsh_attention, qk, v, backend="flash", **settings)
    assert {x.dtype for x in found} == {dtype}
    assert_all_close(found, expected, tolerance=TOLERANCE[dtype])


def test_how_it_is_cut_changes_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    qk, v, settings = inputs(ROW)
    whole = value_and_gradients(lsh_attention, qk, v, backend="flash", **settings)
    monkeypatch.setattr(flash, "ROWS", 1)
    assert_all_close(value_and_gradients(lsh_attention, qk, v, **settings), whole, tolerance=1e-14)


def test_codes_beyond_what_floats_hold_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then they are float64: with float32 they would merge."""
    row = {**ROW, "mode": "strict", "padding": "none"}
    qk, v, settings = inputs(row, dtype=torch.float32)
    expected = value_and_gradients(lsh_attention, qk, v, **settings)
    monkeypatch.setattr(flash, "_EXACT", {torch.float32: 1, torch.float64: 2**53})
    assert_all_close(value_and_gradients(lsh_attention, qk, v, **settings), expected, tolerance=1e-6)


def test_given_buckets_are_left_alone() -> None:
    qk, v, settings = inputs(ROW)
    before = settings["buckets"].clone()
    value_and_gradients(lsh_attention, qk, v, backend="flash", **settings)
    assert torch.equal(settings["buckets"], before)


# Dropout.


def dropped(qk: Tensor, v: Tensor, *, seed: int, **settings: Any) -> Tensor:
    torch.manual_seed(seed)
    out: Tensor = lsh_attention(qk, v, dropout_p=0.4, backend="flash", **settings)
    return out


@pytest.mark.parametrize("mode", FACTORS["mode"])
@pytest.mark.parametrize("duplicates", FACTORS["duplicates"])
def test_backward_drops_what_forward_dropped(mode: str, duplicates: str) -> None:
    qk, v, settings = inputs({**ROW, "mode": mode, "duplicates": duplicates, "seq": 13, "n_hashes": 2})
    assert torch.autograd.gradcheck(lambda qk, v: dropped(qk, v, seed=3, **settings), (qk, v), fast_mode=True)


@pytest.mark.parametrize("mode", FACTORS["mode"])
def test_dropout_changes_no_mean(mode: str) -> None:
    qk, v, settings = inputs({**ROW, "mode": mode, "padding": "none"})
    with torch.no_grad():
        mean = torch.stack([dropped(qk, v, seed=seed, **settings) for seed in range(300)])
        exact = lsh_attention(qk, v, **settings)
    error = mean.std(dim=0) / 300**0.5
    assert float(((mean.mean(dim=0) - exact).abs() > 5 * error + 1e-9).float().mean()) < 0.002


@pytest.mark.parametrize("duplicates", FACTORS["duplicates"])
def test_a_pair_is_dropped_whole_or_kept(duplicates: str) -> None:
    qk, _, settings = inputs({**ROW, "mode": "strict", "duplicates": "count", "padding": "none"})
    seq = qk.shape[2]
    one_hot = torch.eye(seq, dtype=qk.dtype).expand(BATCH, HEADS, seq, seq)
    with torch.no_grad():
        kept = dropped(qk, one_hot, seed=2, **settings)
        full = lsh_attention(qk, one_hot, **settings)
    ratio = (kept / full)[full > 1e-12]
    assert bool(((ratio < 1e-9) | ((ratio - 1 / 0.6).abs() < 1e-9)).all())
    assert 0.3 < float((ratio < 1e-9).double().mean()) < 0.5


# Derivatives of derivatives, and what it cannot do.


def test_it_can_be_differentiated_twice() -> None:
    qk, v, settings = inputs({**ROW, "seq": 5, "n_hashes": 2})
    function = lambda qk, v: lsh_attention(qk, v, backend="flash", **settings)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (qk, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v: function(qk.detach(), v), (v,), fast_mode=True)
    (first,) = torch.autograd.grad(dropped(qk, v, seed=0, **settings).sum(), qk, create_graph=False)
    assert first.shape == qk.shape
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(dropped(qk, v, seed=0, **settings).sum(), qk, create_graph=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seams": "reference", "causality": "published"}, "seams='reference'"),
        ({"causality": "bucket"}, "causality='bucket'"),
        ({"causal": False, "bucket_mask": True}, "bucket_mask"),
    ],
)
def test_what_it_cannot_do_is_said_and_done_by_the_reference(settings: dict[str, Any], says: str) -> None:
    qk, v, others = inputs({**ROW, "mode": "strict", "padding": "none"})
    others = {**others, **settings}
    with pytest.raises(ValueError, match=f"backend='flash': .*{says}.*; use backend='auto' or 'reference'"):
        lsh_attention(qk, v, backend="flash", **others)
    assert torch.equal(lsh_attention(qk, v, **others), lsh_attention(qk, v, backend="reference", **others))


# Memory.


def peak_and_kept(*, rounds: int, backend: str, seq: int = 8192) -> tuple[float, float]:
    """Bytes: the fullest moment of forward and backward, and what forward leaves for backward."""
    qk, v = (torch.randn(1, seq, 2, 64).transpose(1, 2).requires_grad_() for _ in range(2))
    buckets = torch.randint(2 * seq // 64, (1, 2, rounds, seq), dtype=torch.int32)
    upstream = torch.randn(1, seq, 2, 64).transpose(1, 2)
    allocator = CpuAllocator(0)
    with allocator.phase("forward"):
        out = lsh_attention(qk, v, n_hashes=rounds, chunk_length=64, buckets=buckets, backend=backend)
    with allocator.phase("backward"):
        torch.autograd.grad(out, (qk, v), upstream)
    found = {(sample.metric, sample.phase): sample.values[0] for sample in allocator.samples()}
    peak = max(value for (metric, _), value in found.items() if metric == "peak_alloc_bytes")
    return peak, found["saved_bytes", None]


def test_memory_hardly_grows_with_the_rounds() -> None:
    one, eight = (peak_and_kept(rounds=rounds, backend="flash") for rounds in (1, 8))
    tokens = 8192 * 2
    # The output, its log-sum-exp, and an integer a token and round.
    assert one[1] == pytest.approx(tokens * (64 + 1 + 1) * 4, rel=0.01)
    assert eight[1] - one[1] == pytest.approx(tokens * 7 * 4, rel=0.01)
    assert eight[0] <= 1.05 * one[0]


def test_it_needs_a_fraction_of_what_the_reference_needs() -> None:
    flash_peak, reference_peak = (
        peak_and_kept(rounds=4, backend=backend)[0] for backend in ("flash", "reference")
    )
    assert flash_peak < 0.2 * reference_peak
