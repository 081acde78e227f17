"""The C++ kernel: threads, its library, and what it tells torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.probes import Counter
from reformer import lsh_attention
from reformer.hashing import signed_axes
from reformer.kernels import native
from tests.reformer.helpers import value_and_gradients

pytestmark = pytest.mark.skipif(bool(native.missing()), reason=native.missing() or "it is there")


def inputs(seq: int, *, heads: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    qk, v = (torch.randn(1, heads, seq, dim, generator=random).requires_grad_() for dim in (7, 11))
    return qk, v, torch.randint(40, (1, heads, 3, seq), generator=random)


@pytest.mark.parametrize("causality", ["strict", "published"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk_length", [5, 300])
def test_threads_that_share_a_head_find_the_same_to_the_bit(
    causality: str, causal: bool, chunk_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qk, v, buckets = inputs(4999)

    def found(threads: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        return value_and_gradients(
            lsh_attention,
            qk,
            v,
            buckets=buckets,
            n_hashes=3,
            chunk_length=chunk_length,
            causality=causality,
            causal=causal,
            backend="native",
        )

    for threads in (2, 5):
        assert all(torch.equal(a, b) for a, b in zip(found(threads), found(1), strict=True))


@pytest.mark.parametrize("half", [1, 3, 16, 37])
@pytest.mark.parametrize("sizes", [(), (0,), (5,), (2, 3, 5, 7), (2, 3, 5, 1, 7)])
def test_the_nearest_signed_axis_is_the_slow_one(
    half: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many ties, in rows that are a part of longer ones, and in another order than in memory."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randint(-3, 4, (*sizes[::-1], half + 5), generator=random).float()[..., 2 : half + 2]
    rows = rows.permute(*reversed(range(len(sizes))), -1)
    found = signed_axes.nearest_signed_axis(rows)
    monkeypatch.setattr(signed_axes, "_by_kernel", lambda coordinates: False)
    assert torch.equal(found, signed_axes.nearest_signed_axis(rows))


def test_axes_of_what_is_no_number_stay_in_range() -> None:
    rows = torch.full((3, 4), torch.nan)
    rows[1, :2] = torch.tensor([torch.inf, -torch.inf])
    assert bool(((found := signed_axes.nearest_signed_axis(rows)) >= 0).all())
    assert bool((found < 8).all())


def test_a_padding_mask_may_lie_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is copied to be read lives for as long as it is read."""
    qk, v, buckets = (torch.cat([x, x]).detach() for x in inputs(40))
    mask = torch.ones(40, 2, dtype=torch.bool).T
    mask[0, :30] = False
    run = native._Problem.run

    def crowded(problem: native._Problem, what: str) -> None:
        # Whatever was freed too early is overwritten.
        crowd = [torch.zeros(80, dtype=torch.bool) for _ in range(64)]
        run(problem, what)
        del crowd

    monkeypatch.setattr(native._Problem, "run", crowded)
    found, expected = (
        lsh_attention(
            qk, v, buckets=buckets, n_hashes=3, chunk_length=5, padding_mask=given, backend="native"
        )
        for given in (mask, mask.contiguous())
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("dim", [1, 7, 64])
def test_a_step_is_a_softmax_over_its_queues_and_moves_them_on(once: bool, dim: int) -> None:
    random = torch.Generator().manual_seed(0)
    qk = torch.randn(3, 2, dim, 1, generator=random).transpose(2, 3)
    v, store = (torch.randn(*shape, generator=random) for shape in ((3, 2, 1, 11), (6, 23, dim + 11)))
    queues = torch.randint(22, (6, 3, 5, 7), generator=random, dtype=torch.int32)
    queues[1] = 0  # nothing but itself
    buckets = torch.randint(5, (3, 2, 3, 1), generator=random)
    queues_before, store_before = queues.clone(), store.clone()
    found = native.step(
        qk,
        v,
        buckets=buckets,
        queues=queues,
        store=store,
        used=22,
        scale=0.3,
        epsilon=1e-6,
        once=once,
        own_score=-1e5,
    )
    for row in range(6):
        query, value, rounds = qk.flatten(0, 1)[row, 0], v.flatten(0, 1)[row, 0], range(3)
        key = 0.3 * query.double() / (query.double().square().mean() + 1e-6).sqrt()
        torch.testing.assert_close(store[row, 22], torch.cat([key, value]).float(), rtol=1e-5, atol=1e-6)
        theirs = [int(buckets.flatten(0, 1)[row, r]) for r in rounds]
        seen = [int(slot) for r in rounds for slot in queues_before[row, r, theirs[r]] if slot]
        seen = [*(sorted(set(seen)) if once else seen), 22]
        scores = store[row, seen, :dim].double() @ query.double()
        scores[-1] = -1e5
        expected = scores.softmax(dim=0) @ store[row, seen, dim:].double()
        torch.testing.assert_close(found.flatten(0, 1)[row, 0].double(), expected, rtol=0, atol=1e-5)
        for r in rounds:
            moved = torch.cat([queues_before[row, r, theirs[r], 1:], torch.tensor([22])])
            assert torch.equal(queues[row, r, theirs[r]], moved.int())
            queues[row, r, theirs[r]] = queues_before[row, r, theirs[r]]
    assert torch.equal(queues, queues_before)  # the queues of other buckets are untouched
    assert torch.equal(store[:, :22], store_before[:, :22])
    assert torch.equal(found[0, 1, 0], v[0, 1, 0])


def test_a_step_counts_a_score_and_a_value_of_all_in_sight() -> None:
    counter = Counter()
    with counter.phase("step"):
        native.step(
            torch.ones(3, 1, 1, 7),
            torch.ones(3, 1, 1, 11),
            buckets=torch.zeros(3, 1, 4, 1, dtype=torch.long),
            queues=torch.ones(3, 4, 2, 9, dtype=torch.int32),
            store=torch.ones(3, 5, 18),
            used=4,
            scale=1.0,
            epsilon=1e-6,
            once=True,
            own_score=0.0,
        )
    assert counter.samples()[0].values == (2 * 3 * (4 * 9 + 1) * 18,)


def test_its_operations_are_counted_as_those_of_whole_windows() -> None:
    """As those of the tiled path."""
    qk, v, buckets = inputs(4 * 25, heads=3)

    def flops(backend: str) -> float:
        counter = Counter()
        with counter.phase("forward and backward"):
            lsh_attention(
                qk, v, buckets=buckets, n_hashes=3, chunk_length=25, backend=backend
            ).sum().backward()
        return counter.samples()[0].values[0]

    assert flops("native") == flops("flash")


def test_what_its_integers_do_not_hold_is_left_to_the_tiled_path(monkeypatch: pytest.MonkeyPatch) -> None:
    qk, v, buckets = inputs(40)
    settings: dict[str, Any] = {"buckets": buckets, "n_hashes": 3, "chunk_length": 5}
    tiled = value_and_gradients(lsh_attention, qk, v, backend="flash", **settings)
    monkeypatch.setattr(native, "_LARGEST", 41 * 7)
    found = value_and_gradients(lsh_attention, qk, v, backend="native", **settings)
    assert all(torch.equal(a, b) for a, b in zip(found, tiled, strict=True))


def test_it_computes_in_float32_alone() -> None:
    qk, v, buckets = inputs(9)
    with pytest.raises(ValueError, match=r"backend='native': it computes in float32, not in float64"):
        lsh_attention(qk.double(), v, buckets=buckets, n_hashes=3, chunk_length=5, backend="native")


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A user who has no library yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (native.missing, native._library):
        function.cache_clear()
    yield tmp_path
    for function in (native.missing, native._library):
        function.cache_clear()


def test_it_is_compiled_once(fresh: Path) -> None:
    assert not native.missing()
    (made,) = (fresh / "reformer").iterdir()
    before = made.stat().st_mtime_ns
    native.missing.cache_clear()
    native._library.cache_clear()
    assert not native.missing()
    assert made.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("compiler", "says"),
    [
        ("no-such-compiler", "no C.. compiler 'no-such-compiler'; install g.., or name one in CXX"),
        ("false", "false could not compile native.cpp: no message"),
        ("g++ -fno-such-flag", "g.. could not compile native.cpp: .*no-such-flag.*"),
    ],
)
def test_without_a_compiler_the_tiled_path_serves_and_it_is_said_once(
    compiler: str, says: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    qk, v, buckets = inputs(9)
    settings: dict[str, Any] = {"buckets": buckets, "n_hashes": 3, "chunk_length": 5}
    with pytest.warns(UserWarning, match=f"several times slower: {says}"):
        served = lsh_attention(qk, v, **settings)
    assert torch.equal(served, lsh_attention(qk, v, backend="flash", **settings))
    with pytest.raises(ValueError, match=f"backend='native': {says}; use backend='auto' or 'reference'"):
        lsh_attention(qk, v, backend="native", **settings)
