import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer.attention import (
    full_standard_attention,
    lsh_attention,
    reference,
)
from reformer.attention.decode_cache import FullCache, LocalCache, LSHCache, row_ends
from reformer.attention.options import LSHOptions
from reformer.attention.projection import unit_keys
from tests.reformer.helpers import (
    BATCH,
    HEADS,
    SEQ,
    VALUE,
    assert_all_close,
    normal,
    pairwise,
    query_and_value,
    some_buckets,
)
from tests.reformer.operands import LargestOperand

N_BUCKETS = 3


def lsh_cache(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor,
    *,
    prompt: int,
    padding_mask: Tensor | None = None,
    capacity: int | None = None,
    n_buckets: int = N_BUCKETS,
    **options: Any,
) -> LSHCache:
    """The cache behind the first `prompt` tokens."""
    return LSHCache.prefill(
        qk[:, :, :prompt],
        v[:, :, :prompt],
        buckets=buckets[..., :prompt],
        padding_mask=None if padding_mask is None else padding_mask[:, :prompt],
        options=LSHOptions(n_hashes=buckets.shape[2], **options),
        n_buckets=n_buckets,
        capacity=capacity or qk.shape[2],
    )


def tokens_from(start: int, *tensors: Tensor) -> Iterator[list[Tensor]]:
    """One position after the other, of tensors whose sequence is their third axis."""
    for position in range(start, tensors[0].shape[2]):
        yield [x[:, :, position : position + 1] for x in tensors]


def lsh_steps(cache: LSHCache, qk: Tensor, v: Tensor, buckets: Tensor, *, start: int) -> Tensor:
    """What the cache gives for all tokens from `start` on."""
    of_token = tokens_from(start, qk, v, buckets.transpose(2, 3))
    return torch.cat([cache.step(q, x, buckets=ids.transpose(2, 3)) for q, x, ids in of_token], dim=2)


def some_padding(*, prompt: int, seq: int = SEQ) -> Tensor:
    """Padding anywhere in the prompt but at its end, other in each row."""
    real = normal(BATCH, seq, seed=5) > -0.5
    real[:, prompt - 1 :] = True
    return real


# Steps equal the parallel pass.


STEPS: dict[str, tuple[Any, ...]] = {
    "n_hashes": (1, 2, 4),
    "duplicates": ("count", "sum"),
    "n_chunks_before": (1, 2, 3),
    "chunk_length": (1, 2, 5, 7),
    "count": (1, 3, 11),
    "logit_scale": ("trax", "sqrt_d"),
    "prompt": (1, 2, 14, 23, 28),
    "padded": (False, True),
}


@pytest.mark.parametrize("row", pairwise(STEPS))
def test_lsh_steps_equal_the_dense_twin(row: dict[str, Any]) -> None:
    options = dict(row)
    prompt, count = options.pop("prompt"), options.pop("count")
    padding_mask = some_padding(prompt=prompt) if options.pop("padded") else None
    qk, v = query_and_value()
    buckets = some_buckets(options.pop("n_hashes"), count=count)
    expected = reference.lsh_attention(
        qk, v, n_hashes=buckets.shape[2], buckets=buckets, padding_mask=padding_mask, **options
    )
    cache = lsh_cache(qk, v, buckets, prompt=prompt, padding_mask=padding_mask, n_buckets=count, **options)
    steps = lsh_steps(cache, qk, v, buckets, start=prompt)
    assert_all_close([steps], [expected[:, :, prompt:]], tolerance=1e-13)


@pytest.mark.parametrize("backend", ["native", "flash", "reference"])
@pytest.mark.parametrize("row", pairwise(STEPS))
def test_lsh_steps_in_float32_equal_the_wide_twin_whoever_computes_them(
    row: dict[str, Any], backend: str
) -> None:
    options = dict(row)
    prompt, count = options.pop("prompt"), options.pop("count")
    padding_mask = some_padding(prompt=prompt) if options.pop("padded") else None
    qk, v = query_and_value(dtype=torch.float32)
    buckets = some_buckets(options.pop("n_hashes"), count=count)
    common = {"padding_mask": padding_mask, **options}
    expected = reference.lsh_attention(
        qk.double(), v.double(), n_hashes=buckets.shape[2], buckets=buckets, **common
    )
    cache = lsh_cache(qk, v, buckets, prompt=prompt, n_buckets=count, backend=backend, **common)
    steps = lsh_steps(cache, qk, v, buckets, start=prompt)
    assert_all_close([steps], [expected[:, :, prompt:]], tolerance=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt", [1, 6, 14, 23])
@pytest.mark.parametrize(
    ("chunk_length", "n_chunks_before"), [(1, 0), (1, 3), (5, 0), (5, 1), (7, 2), (31, 1)]
)
def test_local_steps_equal_the_dense_twin(
    chunk_length: int, n_chunks_before: int, prompt: int, padded: bool
) -> None:
    padding_mask = some_padding(prompt=prompt) if padded else None
    q, v = query_and_value()
    k, _ = query_and_value(seed=3)
    chunks = {"chunk_length": chunk_length, "n_chunks_before": n_chunks_before}
    expected = reference.local_attention(q, k, v, padding_mask=padding_mask, **chunks)
    cache = LocalCache.prefill(
        k[:, :, :prompt],
        v[:, :, :prompt],
        padding_mask=None if padding_mask is None else padding_mask[:, :prompt],
        **chunks,
    )
    steps = torch.cat([cache.step(*token) for token in tokens_from(prompt, q, k, v)], dim=2)
    assert_all_close([steps], [expected[:, :, prompt:]], tolerance=1e-13)


def full_standard_twin(q: Tensor, k: Tensor, v: Tensor, *, padding_mask: Tensor | None) -> Tensor:
    return full_standard_attention(q, k, v, padding_mask=padding_mask)


def shared_twin(qk: Tensor, _: Tensor, v: Tensor, *, padding_mask: Tensor | None) -> Tensor:
    return reference.full_attention(qk, v, padding_mask=padding_mask)


def oracle_twin(n_keys: int) -> Callable[..., Tensor]:
    def twin(qk: Tensor, _: Tensor, v: Tensor, *, padding_mask: Tensor | None) -> Tensor:
        return reference.oracle_attention(qk, v, n_keys=n_keys, padding_mask=padding_mask)

    return twin


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("prompt", [1, 14])
@pytest.mark.parametrize(
    ("twin", "settings"),
    [
        (full_standard_twin, {"shared_query_key": False}),
        (shared_twin, {"shared_query_key": True}),
        *((oracle_twin(n), {"shared_query_key": True, "n_keys": n}) for n in (0, 1, 5, SEQ)),
    ],
    ids=["full_standard", "full", "oracle 0", "oracle 1", "oracle 5", "oracle all"],
)
def test_full_steps_equal_the_dense_twin(
    twin: Callable[..., Tensor], settings: dict[str, Any], prompt: int, padded: bool
) -> None:
    padding_mask = some_padding(prompt=prompt) if padded else None
    q, v = query_and_value()
    k = unit_keys(q) if settings["shared_query_key"] else query_and_value(seed=3)[0]
    expected = twin(q, k, v, padding_mask=padding_mask)
    cache = FullCache.prefill(
        k[:, :, :prompt],
        v[:, :, :prompt],
        padding_mask=None if padding_mask is None else padding_mask[:, :prompt],
        capacity=SEQ,
        **settings,
    )
    steps = torch.cat([cache.step(*token) for token in tokens_from(prompt, q, k, v)], dim=2)
    assert_all_close([steps], [expected[:, :, prompt:]], tolerance=1e-13)


def test_lsh_steps_equal_the_fast_pass_over_many_chunks() -> None:
    seq, prompt = 401, 173
    qk, v = query_and_value(seq)
    buckets = some_buckets(3, seq, count=5)
    options = {"chunk_length": 5, "n_chunks_before": 2}
    expected = lsh_attention(qk, v, n_hashes=3, buckets=buckets, **options)
    cache = lsh_cache(qk, v, buckets, prompt=prompt, n_buckets=5, **options)
    assert cache.store.shape[1] < seq
    steps = lsh_steps(cache, qk, v, buckets, start=prompt)
    assert_all_close([steps], [expected[:, :, prompt:]], tolerance=1e-13)


# Which tokens are held.


def test_queues_hold_the_last_tokens_of_each_bucket_oldest_first() -> None:
    buckets = torch.tensor([0, 1, 0, 0, 2, 0, 1, 0]).expand(1, 1, 1, 8)
    qk, v = normal(1, 1, 8, 5), normal(1, 1, 8, 5)
    cache = lsh_cache(qk, v, buckets, prompt=7, chunk_length=3)
    # Positions 2, 3 and 5 of bucket 0, 1 and 6 of bucket 1, 4 of bucket 2; slot 0 is nothing.
    assert cache.queues.tolist() == [[[[2, 3, 5], [0, 1, 6], [0, 0, 4]]]]
    assert_all_close([cache.store[0, 1:7, 5:]], [v[0, 0, 1:7]], tolerance=0)
    cache.step(qk[:, :, 7:], v[:, :, 7:], buckets=buckets[..., 7:])
    assert cache.queues.tolist() == [[[[3, 5, 7], [0, 1, 6], [0, 0, 4]]]]
    assert_all_close([cache.store[0, 7, 5:]], [v[0, 0, 7]], tolerance=0)


def test_a_token_that_two_rounds_see_counts_once_or_twice() -> None:
    qk = torch.zeros(1, 1, 3, 1, dtype=torch.float64)
    v = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(1, 1, 3, 1)
    # The last token sees both others in the first round, and the first one in the second.
    buckets = torch.tensor([[0, 0, 0], [1, 0, 1]]).view(1, 1, 2, 3)
    for duplicates, expected in (("count", 5.5), ("sum", (1 + 1 + 10) / 3)):
        cache = lsh_cache(qk, v, buckets, prompt=2, chunk_length=2, duplicates=duplicates)
        out = cache.step(qk[:, :, 2:], v[:, :, 2:], buckets=buckets[..., 2:])
        assert float(out) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("duplicates", ["count", "sum"])
def test_a_token_alone_in_its_buckets_sees_itself_and_nothing_else_does(
    dtype: torch.dtype, duplicates: str
) -> None:
    qk, v = query_and_value(3, dtype=dtype)
    buckets = torch.tensor([[0, 1, 2], [2, 1, 0]]).expand(BATCH, HEADS, 2, 3)
    cache = lsh_cache(qk, v, buckets, prompt=2, chunk_length=2, duplicates=duplicates)
    out = cache.step(qk[:, :, 2:], v[:, :, 2:], buckets=buckets[..., 2:])
    assert out.dtype == dtype
    assert torch.equal(out, v[:, :, 2:])
    shared = torch.zeros_like(buckets)
    one_hot = torch.eye(3, dtype=dtype).expand(BATCH, HEADS, 3, 3)
    cache = lsh_cache(qk, one_hot, shared, prompt=2, chunk_length=2, duplicates=duplicates)
    weights = cache.step(qk[:, :, 2:], one_hot[:, :, 2:], buckets=shared[..., 2:])
    assert (weights[..., 2] == 0).all()


@pytest.mark.parametrize("duplicates", ["count", "sum"])
def test_a_token_counts_itself_as_often_as_the_dense_twin_does(duplicates: str) -> None:
    # A logit of −1e5 for the pair, which is the penalty of a token's own: both weigh the same.
    qk = torch.tensor([1e5, -1e5], dtype=torch.float64).view(1, 1, 2, 1)
    v = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 2, 1)
    buckets = torch.zeros(1, 1, 2, 2, dtype=torch.int64)
    options = {"chunk_length": 2, "duplicates": duplicates}
    cache = lsh_cache(qk, v, buckets, prompt=1, **options)
    out = cache.step(qk[:, :, 1:], v[:, :, 1:], buckets=buckets[..., 1:])
    expected = reference.lsh_attention(qk, v, n_hashes=2, buckets=buckets, **options)
    assert_all_close([out], [expected[:, :, 1:]], tolerance=1e-10)
    assert float(out) == pytest.approx(2.0, rel=1e-10)


def test_ids_of_either_integer_type_give_the_same() -> None:
    qk, v = query_and_value()
    buckets = some_buckets(2)
    outs = []
    for ids in (buckets, buckets.int()):
        cache = lsh_cache(qk, v, ids, prompt=20, chunk_length=3)
        outs.append(lsh_steps(cache, qk, v, ids, start=20))
    assert torch.equal(*outs)


@pytest.mark.parametrize("prompt", [1, 17])
def test_each_row_goes_on_as_if_alone(prompt: int) -> None:
    qk, v = query_and_value()
    buckets = some_buckets(2)
    together = lsh_steps(
        lsh_cache(qk, v, buckets, prompt=prompt, chunk_length=2), qk, v, buckets, start=prompt
    )
    for row in range(BATCH):
        own = [x[row : row + 1] for x in (qk, v, buckets)]
        alone = lsh_steps(lsh_cache(*own, prompt=prompt, chunk_length=2), *own, start=prompt)
        assert_all_close([together[row : row + 1]], [alone], tolerance=1e-14)


def test_rows_go_on_right_behind_their_last_real_token() -> None:
    real = torch.tensor([[True, True, False, False], [False, True, False, True], [False] * 4])
    assert row_ends(real).tolist() == [2, 4, 0]
    k, v = normal(3, HEADS, 4, 5), normal(3, HEADS, 4, VALUE)
    cache = LocalCache.prefill(k, v, padding_mask=real, chunk_length=3, n_chunks_before=0)
    assert cache.positions.tolist() == [[-1, 0, 1], [1, -1, 3], [-1, -1, -1]]
    q, one = normal(3, HEADS, 1, 5, seed=7), normal(3, HEADS, 1, VALUE, seed=8)
    out = cache.step(q, k[:, :, :1], one)
    # The first row is still in chunk 0, which it then fills; the second one sees position 3 of chunk 1.
    for row, past in ((0, [0, 1]), (1, [3]), (2, [])):
        keys = torch.cat([k[row, :, past], k[row, :, :1]], dim=1)
        values = torch.cat([v[row, :, past], one[row]], dim=1)
        weights = (q[row] @ keys.transpose(-1, -2) / 5**0.5).softmax(dim=-1)
        assert_all_close([out[row]], [weights @ values], tolerance=1e-13)


# Cost.


def sizes(cache: LSHCache | LocalCache) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in vars(cache).items() if isinstance(x, Tensor)}


@pytest.mark.parametrize("n_hashes", [1, 3])
def test_an_lsh_cache_and_its_steps_do_not_grow_with_the_length(n_hashes: int) -> None:
    seq, band = 2003, 4
    qk, v = query_and_value(seq)
    buckets = some_buckets(n_hashes, seq)
    shapes, operands = [], []
    for prompt in (101, seq - 50):
        cache = lsh_cache(qk, v, buckets, prompt=prompt, chunk_length=band, capacity=10**6)
        before = cache.used
        new = [x.narrow(dim, prompt, 5) for x, dim in ((qk, 2), (v, 2), (buckets, 3))]
        with LargestOperand() as largest:
            lsh_steps(cache, *new, start=0)
        assert cache.used == before + 5
        shapes.append(sizes(cache))
        operands.append(largest.numel)
    in_sight = n_hashes * N_BUCKETS * band
    assert shapes[0] == shapes[1]
    assert shapes[0]["queues"] == (BATCH * HEADS, n_hashes, N_BUCKETS, band)
    assert shapes[0]["store"] == (BATCH * HEADS, 1 + 2 * in_sight, 7 + VALUE)
    assert operands[0] == operands[1] == shapes[0]["store"].numel()


def test_an_lsh_cache_is_cleared_out_once_in_as_many_steps_as_there_are_tokens_in_sight() -> None:
    seq, band = 403, 4
    qk, v = query_and_value(seq)
    buckets = some_buckets(2, seq)
    cache = lsh_cache(qk, v, buckets, prompt=3, chunk_length=band)
    in_sight = 2 * N_BUCKETS * band
    used = []
    for q, x, ids in tokens_from(3, qk, v, buckets.transpose(2, 3)):
        cache.step(q, x, buckets=ids.transpose(2, 3))
        used.append(cache.used)
    clearings = sum(later < earlier for earlier, later in itertools.pairwise(used))
    assert 1 < clearings <= seq / in_sight
    assert max(used) == 1 + 2 * in_sight


def test_a_short_decode_takes_no_more_store_than_its_tokens() -> None:
    qk, v = query_and_value()
    cache = lsh_cache(qk, v, some_buckets(2), prompt=5, chunk_length=500, capacity=SEQ)
    assert cache.store.shape[1] == 1 + SEQ


def test_a_local_cache_and_its_steps_do_not_grow_with_the_length() -> None:
    seq = 2003
    k, v = query_and_value(seq)
    shapes, operands = [], []
    for prompt in (1, 101, seq - 5):
        cache = LocalCache.prefill(
            k[:, :, :prompt], v[:, :, :prompt], padding_mask=None, chunk_length=5, n_chunks_before=2
        )
        new = [x.narrow(2, prompt, 5) for x in (k, k, v)]
        with LargestOperand() as largest:
            for token in tokens_from(0, *new):
                cache.step(*token)
        shapes.append(sizes(cache))
        operands.append(largest.numel)
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]["keys"] == (BATCH, HEADS, 15, 7)
    assert operands[0] == operands[1] == operands[2] == shapes[0]["values"].numel()


def test_a_full_cache_is_as_long_as_asked_for_and_its_steps_read_what_there_is() -> None:
    k, v = query_and_value(200)
    cache = FullCache.prefill(
        k[:, :, :9], v[:, :, :9], padding_mask=None, capacity=200, shared_query_key=False
    )
    assert cache.keys.shape == (BATCH, HEADS, 200, 7)
    cache.step(*next(tokens_from(9, k, k, v)))
    assert cache.used == 10


# Refusals.


@pytest.mark.parametrize("causality", ["published", "bucket"])
def test_a_causality_that_no_cache_can_follow_is_a_value_error(causality: str) -> None:
    qk, v = query_and_value()
    with pytest.raises(
        ValueError, match=f"causality='{causality}': which keys a token sees depends on later"
    ):
        lsh_cache(qk, v, some_buckets(1), prompt=5, chunk_length=3, causality=causality)


def test_a_full_cache_refuses_another_token() -> None:
    qk, v = query_and_value()
    buckets = torch.zeros(BATCH, HEADS, 1, SEQ, dtype=torch.int64)
    cache = lsh_cache(qk, v, buckets, prompt=3, chunk_length=40, capacity=3)
    full = FullCache.prefill(qk[:, :, :3], v[:, :, :3], padding_mask=None, capacity=3, shared_query_key=True)
    token = next(tokens_from(3, qk, v, buckets.transpose(2, 3)))
    message = r"capacity=3: the cache is full; make it for 4 tokens or more"
    with pytest.raises(ValueError, match=message):
        cache.step(token[0], token[1], buckets=token[2])
    with pytest.raises(ValueError, match=message):
        full.step(token[0], token[0], token[1])
