import pytest
import torch

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
