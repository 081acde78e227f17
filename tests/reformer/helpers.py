"""Small inputs, small models, and pairs of settings."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from reformer import (
    ReformerClassifier,
    ReformerConfig,
    ReformerEncoderDecoder,
    ReformerLM,
    ReformerMaskedLM,
)
from reformer.stacks import run_plain

AnyModel = ReformerLM | ReformerMaskedLM | ReformerClassifier | ReformerEncoderDecoder
MODELS: tuple[type[AnyModel], ...] = (
    ReformerLM,
    ReformerMaskedLM,
    ReformerClassifier,
    ReformerEncoderDecoder,
)

#: A different prime each, so that no axis passes for another.
BATCH, HEADS, DIM, VALUE, SEQ = 2, 3, 7, 11, 29


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def query_and_value(
    seq: int = SEQ, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Shared queries and keys, and values."""
    qk = normal(BATCH, HEADS, seq, DIM, seed=seed, dtype=dtype)
    return qk, normal(BATCH, HEADS, seq, VALUE, seed=seed + 1, dtype=dtype)


def some_buckets(rounds: int, seq: int = SEQ, *, count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(count, (BATCH, HEADS, rounds, seq), generator=generator)


def integers(high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def one_hot_values(seq: int, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Values that make an attention's output its weights."""
    return torch.eye(seq, dtype=dtype).expand(BATCH, HEADS, seq, seq)


def value_and_gradients(
    function: Callable[..., Tensor], *inputs: Tensor, **settings: Any
) -> tuple[Tensor, ...]:
    """An output, and the gradient of a weighted sum of it by each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, **settings)
    weights = normal(*out.shape, seed=97, dtype=out.dtype)
    return (out.detach(), *torch.autograd.grad((out * weights).sum(), leaves))


def assert_all_close(actual: Sequence[Tensor], expected: Sequence[Tensor], *, tolerance: float) -> None:
    """Equal within a share of the largest expected value."""
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, float(b.detach().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(
            a.double(),
            b.double(),
            rtol=0,
            atol=tolerance * scale,
        )


def small_config(**settings: Any) -> ReformerConfig:
    """No two axes of one tensor are equal: 29 tokens are 4 chunks of 9, in 5 rounds of 8 buckets."""
    defaults: dict[str, Any] = {
        "vocab_size": 23,
        "max_length": 31,
        "d_model": 14,
        "d_ff": 17,
        "n_heads": 3,
        "d_head": 11,
        "n_layers": 3,
        "n_hashes": 5,
        "n_buckets": 8,
        "chunk_length": 9,
    }
    return ReformerConfig(**(defaults | settings))


def small_model(*, dtype: torch.dtype = torch.float64, **settings: Any) -> ReformerLM:
    return ReformerLM(small_config(**settings)).to(dtype)


@contextmanager
def nothing_recomputed() -> Iterator[None]:
    """Reversible stacks keep every activation, with the same arithmetic: what their gradients should be."""
    with mock.patch("reformer.stacks.run_reversible", run_plain):
        yield


def with_residual(model: ReformerLM, residual: str) -> ReformerLM:
    """Another model with the same weights, draw counter and mode."""
    other = ReformerLM(replace(model.config, residual=residual)).to(model.embedding.weight.dtype)
    other.load_state_dict(model.state_dict())
    return other.train(model.training)


def small_tokens(seq: int = SEQ, *, seed: int = 0) -> Tensor:
    return integers(23, BATCH, seq, seed=seed)


def any_model(build: type[AnyModel], *, dtype: torch.dtype = torch.float64, **settings: Any) -> AnyModel:
    """One of `MODELS`; an encoder is as its decoder, but not causal."""
    causal = build in (ReformerLM, ReformerEncoderDecoder)
    return build(small_config(causal=causal, n_classes=13, **settings)).to(dtype)


def inputs_and_targets(build: type[AnyModel], *, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    """What such a model is called with, and what it should give: a token a place, or a class a row."""
    inputs, targets = (small_tokens(seed=seed),), small_tokens(seed=seed + 1)
    if build is ReformerEncoderDecoder:
        inputs = (small_tokens(19, seed=seed + 2), *inputs)
    return inputs, integers(13, BATCH, seed=seed + 1) if build is ReformerClassifier else targets


def pairwise(
    factors: Mapping[str, Sequence[Any]], *, allowed: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """Few combinations in which each pair of levels that is allowed together occurs, chosen greedily."""
    draw = random.Random(0)
    names = list(factors)
    candidates: list[dict[str, Any]] = []
    while len(candidates) < 3000:
        chosen = {name: draw.choice(list(factors[name])) for name in names}
        if allowed(chosen):
            candidates.append(chosen)
    pairs = [_pairs(candidate) for candidate in candidates]
    missing = set().union(*pairs)
    rows = []
    while missing:
        best = max(range(len(candidates)), key=lambda index: len(pairs[index] & missing))
        rows.append(candidates[best])
        missing -= pairs[best]
    return rows


def _pairs(row: dict[str, Any]) -> set[tuple[tuple[str, str], ...]]:
    return set(itertools.combinations([(name, repr(level)) for name, level in row.items()], 2))
