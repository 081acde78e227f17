import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from reformer.attention.sorting import sort_by_bucket, sort_rows, unsort_rows
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal, some_buckets


@given(st.lists(st.integers(0, 5), min_size=1, max_size=23))
def test_the_order_is_by_bucket_and_then_by_position(ids: list[int]) -> None:
    order = sort_by_bucket(torch.tensor(ids)[None, None, None])
    assert order.positions[0, 0, 0].tolist() == sorted(range(len(ids)), key=lambda i: (ids[i], i))


def test_slots_undo_positions_in_every_round() -> None:
    order = sort_by_bucket(some_buckets(5))
    every = torch.arange(SEQ).expand_as(order.positions)
    assert torch.equal(order.positions.gather(-1, order.slots), every)
    assert torch.equal(order.slots.gather(-1, order.positions), every)


def test_large_ids_and_long_sequences_sort_without_overflow() -> None:
    seq = 100_003
    ids = torch.arange(seq).flip(0) // 2 + 2**30
    order = sort_by_bucket(ids.int().expand(1, 1, 2, seq))
    assert torch.equal(ids[order.positions[0, 0, 1]].sort().values, ids[order.positions[0, 0, 1]])
    assert order.positions[0, 0, 0, :3].tolist() == [seq - 2, seq - 1, seq - 4]


def test_sorted_rows_are_the_rows_at_the_sorted_positions() -> None:
    x, order = normal(BATCH, HEADS, SEQ, DIM), sort_by_bucket(some_buckets(5))
    rows = sort_rows(x, order)
    b, h, r, s = 1, 2, 4, 17
    assert torch.equal(rows[b, h, r, s], x[b, h, order.positions[b, h, r, s]])


def test_unsorting_undoes_sorting() -> None:
    x, order = normal(BATCH, HEADS, SEQ, DIM), sort_by_bucket(some_buckets(5))
    assert torch.equal(unsort_rows(sort_rows(x, order), order), x.unsqueeze(2).expand(-1, -1, 5, -1, -1))


@given(st.integers(1, 4), st.integers(0, 23), st.integers(1, 9), st.integers(0, 2**16))
def test_whatever_the_buckets_unsorting_undoes_sorting_and_slots_undo_positions(
    rounds: int, seq: int, count: int, seed: int
) -> None:
    order = sort_by_bucket(some_buckets(rounds, seq, count=count, seed=seed))
    every = torch.arange(seq).expand(BATCH, HEADS, rounds, seq)
    assert torch.equal(order.positions.gather(-1, order.slots), every)
    assert torch.equal(order.slots.gather(-1, order.positions), every)
    x = normal(BATCH, HEADS, seq, DIM, seed=seed)
    rows = x.unsqueeze(2).expand(-1, -1, rounds, -1, -1)
    assert torch.equal(unsort_rows(sort_rows(x, order), order), rows)


@pytest.mark.parametrize("move", [sort_rows, unsort_rows])
def test_gradients_equal_those_of_a_plain_gather(move: object) -> None:
    order = sort_by_bucket(some_buckets(5))
    shape = (BATCH, HEADS, SEQ, DIM) if move is sort_rows else (BATCH, HEADS, 5, SEQ, DIM)
    x, pull = normal(*shape).requires_grad_(), normal(BATCH, HEADS, 5, SEQ, DIM, seed=1)
    index = order.positions if move is sort_rows else order.slots

    def plain(x: Tensor) -> Tensor:
        rows = x.unsqueeze(2).expand(-1, -1, 5, -1, -1) if move is sort_rows else x
        return rows.gather(3, index.unsqueeze(-1).expand(-1, -1, -1, -1, DIM))

    moved = sort_rows(x, order) if move is sort_rows else unsort_rows(x, order)
    (expected,) = torch.autograd.grad(plain(x), x, pull)
    (actual,) = torch.autograd.grad(moved, x, pull)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_backward_gathers_and_never_scatters() -> None:
    x, order = normal(BATCH, HEADS, SEQ, DIM).requires_grad_(), sort_by_bucket(some_buckets(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        unsort_rows(sort_rows(x, order), order).sum().backward()
    names = {event.key for event in profiler.key_averages()}
    assert "aten::gather" in names
    assert not any("scatter" in name or "index_add" in name for name in names)
