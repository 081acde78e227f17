import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reformer.attention import chunking
from tests.reformer.helpers import normal


@pytest.mark.parametrize(
    ("seq", "length", "chunks"), [(29, 5, 6), (28, 7, 4), (11, 17, 1), (0, 3, 0), (1, 1, 1)]
)
def test_chunks_cover_the_sequence(seq: int, length: int, chunks: int) -> None:
    assert chunking.n_chunks(seq, chunk_length=length) == chunks
    x = normal(2, seq, 3)
    padded = chunking.pad_to_chunks(x, chunk_length=length)
    assert padded.shape == (2, chunks * length, 3)
    assert torch.equal(padded[:, :seq], x)
    assert (padded[:, seq:] == 0).all()


def test_whole_chunks_are_not_copied() -> None:
    x = normal(2, 28, 3)
    assert chunking.pad_to_chunks(x, chunk_length=7) is x


def test_merging_undoes_splitting() -> None:
    x = normal(2, 28, 3)
    chunks = chunking.split_chunks(x, chunk_length=7)
    assert torch.equal(chunks[1, 2], x[1, 14:21])
    assert torch.equal(chunking.merge_chunks(chunks), x)


@given(st.integers(0, 40), st.integers(1, 13))
def test_cutting_and_joining_a_padded_sequence_gives_it_back(seq: int, length: int) -> None:
    x = normal(2, seq, 3)
    padded = chunking.pad_to_chunks(x, chunk_length=length)
    chunks = chunking.split_chunks(padded, chunk_length=length)
    assert chunks.shape == (2, chunking.n_chunks(seq, chunk_length=length), length, 3)
    merged = chunking.merge_chunks(chunks)
    assert torch.equal(merged, padded)
    assert torch.equal(merged[:, :seq], x)
    assert 0 <= merged.shape[1] - seq < length


@given(st.integers(1, 9), st.integers(1, 5), st.lists(st.integers(-12, 12), min_size=1, max_size=4))
def test_look_around_is_a_loop_over_chunks_and_offsets(count: int, length: int, offsets: list[int]) -> None:
    chunks = normal(2, count, length, 3)
    window = chunking.look_around(chunks, offsets=offsets)
    for index in range(count):
        seen = [chunks[:, (index + offset) % count] for offset in offsets]
        assert torch.equal(window[:, index], torch.cat(seen, dim=1))


def test_a_window_is_the_chunks_at_the_offsets_in_their_order() -> None:
    chunks = chunking.split_chunks(normal(2, 35, 3), chunk_length=7)
    window = chunking.look_around(chunks, offsets=(-2, 0, 1))
    assert torch.equal(window[:, 3], torch.cat([chunks[:, 1], chunks[:, 3], chunks[:, 4]], dim=1))
    assert torch.equal(window[:, 0], torch.cat([chunks[:, 3], chunks[:, 0], chunks[:, 1]], dim=1))
    assert torch.equal(window[:, 4], torch.cat([chunks[:, 2], chunks[:, 4], chunks[:, 0]], dim=1))


def test_window_chunks_name_the_chunks_of_look_around_before_wrapping() -> None:
    numbered = torch.arange(5).view(5, 1, 1)
    offsets = (-2, 0, 1)
    index = chunking.window_chunks(5, offsets=offsets, device=torch.device("cpu"))
    assert index[0].tolist() == [-2, 0, 1]
    assert index[4].tolist() == [2, 4, 5]
    assert torch.equal(index % 5, chunking.look_around(numbered, offsets=offsets).squeeze(-1))
