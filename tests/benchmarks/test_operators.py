"""Micro-benchmarks of the operators that LSH attention is made of, and of a step of a small language model.

    make bench
    make bench BENCH='--benchmark-json operators.json -k hash'

4096 tokens in 8 heads of 64, 4 rounds, chunks of 64; threads as torch takes them (OMP_NUM_THREADS).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import CrossPolytope, ReformerConfig, ReformerLM
from reformer.attention import chunking, lsh
from reformer.attention.options import BACKENDS, LSHOptions, hash_vectors
from reformer.attention.projection import unit_keys
from reformer.attention.rounds import combine_rounds
from reformer.attention.sorting import SortOrder, sort_by_bucket, sort_rows, unsort_rows
from reformer.hashing import buckets as bucket_counts

SEQ, HEADS, DIM, ROUNDS, CHUNK = 4096, 8, 64, 4, 64
N_BUCKETS = bucket_counts.automatic(max_length=SEQ, chunk_length=CHUNK)
CPU = torch.device("cpu")


def serves(backend: str) -> bool:
    """Whether that backend computes these settings here; `auto` is one of the others."""
    try:
        return LSHOptions(n_hashes=ROUNDS, chunk_length=CHUNK, backend=backend).backend_on(CPU) == backend
    except ValueError:
        return False


SERVING = [backend for backend in BACKENDS if serves(backend)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def qk() -> Tensor:
    return random(1, HEADS, SEQ, DIM, seed=0)


@pytest.fixture(scope="module")
def v() -> Tensor:
    return random(1, HEADS, SEQ, DIM, seed=1)


@pytest.fixture(scope="module")
def ids(qk: Tensor) -> Tensor:
    return hashed(qk)


@pytest.fixture(scope="module")
def order(ids: Tensor) -> SortOrder:
    return sort_by_bucket(ids)


def hashed(qk: Tensor) -> Tensor:
    return hash_vectors(
        qk,
        hashing=CrossPolytope(),
        n_hashes=ROUNDS,
        n_buckets=N_BUCKETS,
        generator=torch.Generator().manual_seed(0),
    )


def test_hash(benchmark: Any, qk: Tensor) -> None:
    assert benchmark(hashed, qk).shape == (1, HEADS, ROUNDS, SEQ)


def test_sort(benchmark: Any, ids: Tensor) -> None:
    assert benchmark(sort_by_bucket, ids).positions.shape == ids.shape


def test_gather(benchmark: Any, qk: Tensor, order: SortOrder) -> None:
    assert benchmark(sort_rows, qk, order).shape == (1, HEADS, ROUNDS, SEQ, DIM)


def test_chunk_attention(benchmark: Any, qk: Tensor, v: Tensor, ids: Tensor, order: SortOrder) -> None:
    """Scores, masks, softmax and weighted values of all chunks at once, as the reference backend has them."""
    query, key, values = (
        chunking.split_chunks(sort_rows(x, order).flatten(2, 3), chunk_length=CHUNK)
        for x in (qk, unit_keys(qk), v)
    )
    out, _ = benchmark(
        lsh._attend_chunks,
        query,
        key,
        values,
        buckets=ids,
        order=order,
        real=torch.ones(1, SEQ, dtype=torch.bool),
        options=LSHOptions(n_hashes=ROUNDS, chunk_length=CHUNK),
    )
    assert out.shape == query.shape


def test_combine(benchmark: Any, order: SortOrder) -> None:
    """Rounds back in the order of the tokens, and weighted by their log-sum-exp."""
    out = random(1, HEADS, ROUNDS, SEQ, DIM, seed=2)
    logsumexp = random(1, HEADS, ROUNDS, SEQ, seed=3)
    combined = benchmark(lambda: combine_rounds(unsort_rows(out, order), logsumexp))
    assert combined.shape == (1, HEADS, SEQ, DIM)


@pytest.mark.parametrize("backend", SERVING)
def test_attention(benchmark: Any, backend: str, qk: Tensor, v: Tensor, ids: Tensor) -> None:
    """From buckets to the output: sort, gather, attend, combine."""
    out = benchmark(attend, qk, v, ids, backend=backend)
    assert out.shape == v.shape


@pytest.mark.parametrize("backend", SERVING)
def test_backward(benchmark: Any, backend: str, qk: Tensor, v: Tensor, ids: Tensor) -> None:
    """Of the same, the forward pass left out."""
    gradient = random(1, HEADS, SEQ, DIM, seed=4)

    def forward() -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        leaves = (qk.clone().requires_grad_(), v.clone().requires_grad_())
        return (attend(*leaves, ids, backend=backend), gradient), {}

    benchmark.pedantic(lambda out, gradient: out.backward(gradient), setup=forward, rounds=5, warmup_rounds=1)


def attend(qk: Tensor, v: Tensor, ids: Tensor, *, backend: str) -> Tensor:
    options = LSHOptions(n_hashes=ROUNDS, chunk_length=CHUNK, backend=backend)
    return lsh.attend(qk, v, buckets=ids, padding_mask=None, options=options)


@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_language_model_step(benchmark: Any, residual: str) -> None:
    """Forward and backward of 2 layers of width 256 on 1024 tokens."""
    torch.manual_seed(0)
    config = ReformerConfig(vocab_size=256, max_length=1024, n_layers=2, residual=residual)
    model = ReformerLM(config)
    tokens = torch.randint(256, (1, 1025), generator=torch.Generator().manual_seed(5))

    def step() -> Tensor:
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    assert benchmark(step) > 0
