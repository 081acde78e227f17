"""The engines, held to the dense twin and to the reference backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.probes import CpuAllocator
from reformer import lsh_attention
from reformer.attention import reference
from reformer.kernels import flash, native
from tests.reformer.helpers import assert_all_close, pairwise, value_and_gradients
from tests.reformer.kernels import union_cases

#: Unlike the batch rows.
HEADS = 3
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
    "threads": (1, 2, 8),
}
#: What each computes in at its widest.
WIDEST = {"native": torch.float32, "flash": torch.float64}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(params=["native", "flash"])
def engine(request: pytest.FixtureRequest) -> str:
    """Each in turn."""
    name: str = request.param
    if name == "native" and native.missing():
        pytest.skip(native.missing())
    return name


def inputs(
    row: dict[str, Any], *, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return union_cases.inputs({"chunk_length": 5, **row}, dtype=dtype, heads=HEADS)


@pytest.mark.parametrize("row", pairwise(FACTORS))
def test_values_and_gradients_are_those_of_the_dense_twin(
    engine: str, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "PAIRS", row["pairs"])
    monkeypatch.setattr(flash, "ROWS", row["rows"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: row["threads"])
    qk, v, settings = inputs(row)
    expected = value_and_gradients(reference.lsh_attention, qk, v, **settings)
    narrow = [x.detach().to(WIDEST[engine]).requires_grad_() for x in (qk, v)]
    found = value_and_gradients(lsh_attention, *narrow, backend=engine, **settings)
    assert_all_close(found, expected, tolerance=TOLERANCE[WIDEST[engine]])


ROW: dict[str, Any] = {name: levels[-1] for name, levels in FACTORS.items()} | {"padding": "scattered"}


def test_given_buckets_are_left_alone(engine: str) -> None:
    qk, v, settings = inputs(ROW, dtype=torch.float32)
    before = settings["buckets"].clone()
    value_and_gradients(lsh_attention, qk, v, backend=engine, **settings)
    assert torch.equal(settings["buckets"], before)


def test_bucket_numbers_may_be_anything(engine: str) -> None:
    qk, v, settings = inputs(ROW, dtype=torch.float32)
    expected = value_and_gradients(lsh_attention, qk, v, backend=engine, **settings)
    settings["buckets"] = (settings["buckets"] - 2) * 10**9
    found = value_and_gradients(lsh_attention, qk, v, backend=engine, **settings)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Dropout.


def dropped(qk: Tensor, v: Tensor, *, seed: int, **settings: Any) -> Tensor:
    torch.manual_seed(seed)
    out: Tensor = lsh_attention(qk, v, dropout_p=0.4, **settings)
    return out


def one_hot(qk: Tensor) -> Tensor:
    """Values that make the output the weights."""
    return torch.eye(qk.shape[2], dtype=qk.dtype).expand(*qk.shape[:3], -1)


@pytest.mark.parametrize("mode", FACTORS["mode"])
@pytest.mark.parametrize(("duplicates", "rounds"), [("count", 2), ("sum", 1)])
def test_backward_drops_what_forward_dropped(engine: str, mode: str, duplicates: str, rounds: int) -> None:
    row = {**ROW, "mode": mode, "duplicates": duplicates, "seq": 13, "n_hashes": rounds}
    qk, v, settings = inputs(row, dtype=WIDEST[engine])
    found = value_and_gradients(dropped, qk, v, seed=3, backend=engine, **settings)
    with torch.no_grad():
        kept = dropped(qk, one_hot(qk), seed=3, backend=engine, **settings).double()
        full = lsh_attention(qk, one_hot(qk), backend=engine, **settings).double()
        keep = torch.where(full > 0, kept / full, 0)

    def expected(qk: Tensor, v: Tensor) -> Tensor:
        weights = lsh_attention(qk, one_hot(qk), backend="reference", **settings)
        return (weights * keep) @ v

    wide = value_and_gradients(expected, qk.double(), v.double())
    assert_all_close(found, wide, tolerance=5 * TOLERANCE[WIDEST[engine]])


@pytest.mark.parametrize("mode", FACTORS["mode"])
@pytest.mark.parametrize("duplicates", FACTORS["duplicates"])
def test_gradients_under_dropout_are_slopes(mode: str, duplicates: str) -> None:
    row = {**ROW, "mode": mode, "duplicates": duplicates, "seq": 13, "n_hashes": 2}
    qk, v, settings = inputs(row)
    function = lambda qk, v: dropped(qk, v, seed=3, backend="flash", **settings)  # noqa: E731
    assert torch.autograd.gradcheck(function, (qk, v), fast_mode=True)


@pytest.mark.parametrize("mode", FACTORS["mode"])
def test_dropout_changes_no_mean(engine: str, mode: str) -> None:
    qk, v, settings = inputs({**ROW, "mode": mode, "padding": "none"}, dtype=WIDEST[engine])
    settings["backend"] = engine
    with torch.no_grad():
        mean = torch.stack([dropped(qk, v, seed=seed, **settings) for seed in range(300)])
        exact = lsh_attention(qk, v, **settings)
    error = mean.std(dim=0) / 300**0.5
    assert float(((mean.mean(dim=0) - exact).abs() > 5 * error + 1e-6).float().mean()) < 0.002


def test_a_pair_is_dropped_whole_or_kept(engine: str) -> None:
    row = {**ROW, "mode": "strict", "duplicates": "count", "padding": "none"}
    qk, _, settings = inputs(row, dtype=WIDEST[engine])
    settings["backend"] = engine
    with torch.no_grad():
        kept = dropped(qk, one_hot(qk), seed=2, **settings)
        full = lsh_attention(qk, one_hot(qk), **settings)
    ratio = (kept / full)[full > 1e-6]
    assert bool(((ratio == 0) | ((ratio - 1 / 0.6).abs() < 1e-5)).all())
    assert 0.3 < float((ratio == 0).double().mean()) < 0.5


def test_dropout_is_drawn_for_each_head_and_round(engine: str) -> None:
    """Equal heads under equal buckets, at a length at which masks can hardly be equal by chance."""
    qk = torch.randn(1, 1, 64, union_cases.DIM).expand(2, 3, -1, -1)
    buckets = torch.zeros(2, 3, 2, 64, dtype=torch.int64)
    with torch.no_grad():
        two, one = (
            dropped(
                qk,
                one_hot(qk),
                seed=1,
                buckets=buckets[:, :, :rounds],
                n_hashes=rounds,
                chunk_length=16,
                duplicates="sum",
                backend=engine,
            )
            for rounds in (2, 1)
        )
    heads = two.flatten(0, 1)
    assert not any(torch.equal(heads[i], heads[j]) for i in range(6) for j in range(i))
    assert not torch.allclose(two, one)
    # Some pairs are dropped in one round of two: half of the weight is left.
    assert len(one.flatten().unique()) < len(two.flatten().unique())


# Derivatives of derivatives, and what they cannot do.


def test_they_can_be_differentiated_twice(engine: str) -> None:
    qk, v, settings = inputs({**ROW, "seq": 5, "n_hashes": 2}, dtype=WIDEST[engine])
    settings["backend"] = engine

    def slopes(backend: str) -> tuple[Tensor, ...]:
        out = lsh_attention(qk, v, **{**settings, "backend": backend})
        first = torch.autograd.grad((out**2).sum(), (qk, v), create_graph=True)
        return torch.autograd.grad(sum((x**2).sum() for x in first), (qk, v))

    assert_all_close(slopes(engine), slopes("reference"), tolerance=1e-5)
    (first,) = torch.autograd.grad(dropped(qk, v, seed=0, **settings).sum(), qk, create_graph=False)
    assert first.shape == qk.shape
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(dropped(qk, v, seed=0, **settings).sum(), qk, create_graph=True)


def test_second_derivatives_are_slopes() -> None:
    qk, v, settings = inputs({**ROW, "seq": 5, "n_hashes": 2})
    function = lambda qk, v: lsh_attention(qk, v, backend="flash", **settings)  # noqa: E731
    assert torch.autograd.gradgradcheck(function, (qk, v), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda v: function(qk.detach(), v), (v,), fast_mode=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seams": "reference", "causality": "published"}, "seams='reference'"),
        ({"causality": "bucket"}, "causality='bucket'"),
        ({"causal": False, "bucket_mask": True}, "bucket_mask"),
    ],
)
def test_what_they_cannot_do_is_said_and_done_by_the_reference(
    engine: str, settings: dict[str, Any], says: str
) -> None:
    qk, v, others = inputs({**ROW, "mode": "strict", "padding": "none"}, dtype=torch.float32)
    others = {**others, **settings}
    with pytest.raises(
        ValueError, match=f"backend='{engine}': .*{says}.*; use backend='auto' or 'reference'"
    ):
        lsh_attention(qk, v, backend=engine, **others)
    assert torch.equal(lsh_attention(qk, v, **others), lsh_attention(qk, v, backend="reference", **others))


# Memory.


LENGTH, MANY = 2048, 8


def peak_and_kept(*, rounds: int, backend: str) -> tuple[float, float]:
    """Bytes: the fullest moment of forward and backward, and what forward leaves for backward."""
    qk, v = (torch.randn(1, LENGTH, MANY, 64).transpose(1, 2).requires_grad_() for _ in range(2))
    buckets = torch.randint(2 * LENGTH // 64, (1, MANY, rounds, LENGTH), dtype=torch.int32)
    upstream = torch.randn(1, LENGTH, MANY, 64).transpose(1, 2)
    allocator = CpuAllocator(0)
    with allocator.phase("forward"):
        out = lsh_attention(qk, v, n_hashes=rounds, chunk_length=64, buckets=buckets, backend=backend)
    with allocator.phase("backward"):
        torch.autograd.grad(out, (qk, v), upstream)
    found = {(sample.metric, sample.phase): sample.values[0] for sample in allocator.samples()}
    peak = max(value for (metric, _), value in found.items() if metric == "peak_alloc_bytes")
    return peak, found["saved_bytes", None]


def test_memory_hardly_grows_with_the_rounds(engine: str) -> None:
    one, eight = (peak_and_kept(rounds=rounds, backend=engine) for rounds in (1, 8))
    tokens = LENGTH * MANY
    # The output, its log-sum-exp, and an integer a token and round.
    assert one[1] == pytest.approx(tokens * (64 + 1 + 1) * 4, rel=0.01)
    assert eight[1] - one[1] == pytest.approx(tokens * 7 * 4, rel=0.01)
    assert eight[0] <= 1.05 * one[0]


def test_they_need_a_fraction_of_what_the_reference_needs(engine: str) -> None:
    peak, reference_peak = (peak_and_kept(rounds=4, backend=backend)[0] for backend in (engine, "reference"))
    assert peak < 0.2 * reference_peak
