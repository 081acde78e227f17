import pytest
import torch

from reformer.attention.masking import MASKED, SELF, Visibility, mask_scores, visibility
from reformer.attention.options import LSHOptions
from reformer.attention.sorting import sort_by_bucket


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hidden_is_below_oneself_and_oneself_below_any_other_logit(dtype: torch.dtype) -> None:
    scores = torch.tensor([[-3e4, 3e4, 3e4]], dtype=dtype)
    masked = mask_scores(
        scores, hidden=torch.tensor([[False, False, True]]), own=torch.tensor([[False, True, False]])
    )[0]
    assert masked[2] < masked[1] < masked[0]
    assert masked.isfinite().all()
    assert masked.softmax(dim=-1).tolist() == [1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_hidden_own_key_is_never_raised_again(dtype: torch.dtype) -> None:
    hidden, own = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    masked = mask_scores(torch.zeros(1, 2, dtype=dtype), hidden=hidden, own=own)
    assert masked.tolist() == [[torch.tensor(MASKED, dtype=dtype).item()] * 2]
    assert MASKED < SELF


def test_alone_with_hidden_keys_a_token_keeps_all_weight() -> None:
    hidden, own = torch.tensor([[False, True, True]]), torch.tensor([[True, False, False]])
    weights = mask_scores(torch.tensor([[-7.0, 9e3, 3.0]]), hidden=hidden, own=own).softmax(dim=-1)
    assert weights.tolist() == [[1, 0, 0]]


def seen_pairs(ids: list[int], **settings: object) -> list[list[bool]]:
    buckets = torch.tensor(ids)[None, None, None]
    order = sort_by_bucket(buckets)
    options = LSHOptions(n_hashes=1, **settings)  # type: ignore[arg-type]
    seen = visibility(order, buckets, options=options, n_chunks=len(ids) // options.chunk_length)
    codes = seen.codes[0, 0, 0]
    pairs: list[list[bool]] = seen.sees(codes[:, None], codes[None, :]).tolist()
    return pairs


def test_published_codes_see_chunks_back_and_ahead() -> None:
    pairs = seen_pairs([0, 0, 0, 0, 0, 0], chunk_length=2, causality="published", n_chunks_after=0)
    assert pairs[2] == [True, True, True, True, False, False]
    pairs = seen_pairs([0, 0, 0, 0, 0, 0], chunk_length=2, causal=False)
    assert pairs[0] == [True, True, True, True, False, False]
    assert pairs[5] == [False, False, True, True, True, True]


def test_strict_codes_see_the_last_entries_of_the_own_bucket() -> None:
    ids = [0, 1, 0, 0, 1, 0]
    pairs = seen_pairs(ids, chunk_length=2)
    assert pairs[5] == [False, False, True, True, False, True]
    assert pairs[4] == [False, True, False, False, True, False]


def test_bucket_codes_see_neither_other_buckets_nor_far_chunks() -> None:
    pairs = seen_pairs([0, 0, 0, 0, 0, 1], chunk_length=2, causality="bucket")
    assert pairs[4] == [False, False, True, True, True, False]
    assert pairs[5] == [False, False, False, False, False, True]


def test_with_reference_seams_the_first_chunk_sees_the_last() -> None:
    settings = {"chunk_length": 2, "causality": "published"}
    assert seen_pairs([0] * 6, seams="reference", **settings)[0] == [True, True, False, False, True, True]
    assert seen_pairs([0] * 6, seams="masked", **settings)[0] == [True, True, False, False, False, False]


def test_wrapping_keeps_buckets_apart_when_asked() -> None:
    settings = {"chunk_length": 2, "causal": False, "bucket_mask": True, "seams": "reference"}
    assert seen_pairs([0] * 8, **settings)[0] == [True, True, True, True, False, False, True, True]
    assert seen_pairs([0, 0, 0, 0, 0, 0, 0, 1], **settings)[0] == [True] * 4 + [False, False, True, False]


def test_rounds_that_touch_share_views_and_rounds_kept_apart_do_not() -> None:
    buckets = torch.zeros(1, 1, 3, 6, dtype=torch.int64)

    def views(**settings: object) -> tuple[tuple[int, int], ...]:
        options = LSHOptions(n_hashes=3, chunk_length=2, causality="published", **settings)  # type: ignore[arg-type]
        seen: Visibility = visibility(sort_by_bucket(buckets), buckets, options=options, n_chunks=3)
        return seen.views

    assert views() == ((0, 0), (1, 1), (2, 2))
    # No look-ahead: a round meets itself and the round before.
    assert set(views(seams="reference")) == {(0, 0), (0, 2), (1, 0), (1, 1), (2, 1), (2, 2)}
