"""The floor of a layer: its matrix products, counted by torch itself, and the rate they are held against."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.workloads.attention import open_layer
from harness.workloads.floor import floor_samples, model_floor_samples, product_flops, product_rates
from harness.workloads.session import open_session
from reformer import ReformerConfig
from tests.harness.specs import trial_spec


def config(**settings: Any) -> ReformerConfig:
    return trial_spec(**{"attention__chunk_length": 4, **settings}).reformer_config()


def counted(**settings: Any) -> int:
    """FLOPs of forward that torch counts, hashing left out as every token is in a bucket without it."""
    spec = trial_spec(**{"attention__chunk_length": 4, **settings})
    session = open_layer(spec, implementation="ours")
    with FlopCounterMode(display=False) as counter:
        session.forward(session.inputs)
    return int(counter.get_total_flops())


def test_products_of_lsh_attention_are_those_of_its_reference_backend() -> None:
    settings: dict[str, Any] = {
        "attention__backend": "reference",
        "hashing": {"_target_": "reformer.Random"},  # needs no product
        "attention__n_hashes": 3,
        "attention__causality": "published",
    }
    forward, _ = product_flops(config(**settings), batch=3, seq=32)
    assert forward == counted(**settings)


def test_windows_are_as_wide_as_their_chunks() -> None:
    def scores(**settings: Any) -> int:
        forward, backward = product_flops(
            config(attention__causality="published", **settings), batch=1, seq=32
        )
        return backward - 2 * forward

    one = 2 * 32 * 2 * (2 * 4) * 16  # tokens, rounds, window, width
    assert scores() == one
    assert scores(attention__n_chunks_after=1) == scores(attention__n_chunks_before=2) == 1.5 * one
    assert scores(attention__n_hashes=4) == 2 * one
    assert scores(attention__chunk_length=64) == 4 * one  # no window is longer than the sequence
    assert scores(model__layers=["local"]) == one / 2
    assert scores(model__layers=["local"], local__chunk_length=8) == one
    assert scores(model__layers=["full_standard"]) == 2 * (32 * 33 // 2) * 16


@pytest.mark.parametrize("seq", [1, 32, 37, 300])
@pytest.mark.parametrize("buckets", [2, 8, 64])
@pytest.mark.parametrize("chunk_length", [1, 5, 64])
def test_strict_layers_have_the_pairs_of_equally_full_buckets_and_never_more_than_others(
    seq: int, buckets: int, chunk_length: int
) -> None:
    settings = {"attention__n_buckets": buckets, "attention__chunk_length": chunk_length}
    made = config(attention__causality="strict", attention__n_hashes=1, **settings)
    forward, backward = product_flops(made, batch=1, seq=seq)
    found = (backward - 2 * forward) // (2 * made.n_heads * made.head_width)

    def pairs(ids: torch.Tensor) -> int:
        """Seen by brute force: of the same bucket, before it there, no further than the band."""
        total = 0
        for bucket in ids.unique():
            size = int((ids == bucket).sum())
            total += sum(min(rank, chunk_length) for rank in range(size))
        return total

    assert found == pairs(torch.arange(seq) % buckets)
    random = torch.randint(buckets, (20, seq), generator=torch.Generator().manual_seed(0))
    assert all(found <= pairs(ids) for ids in random)


def test_a_layer_with_keys_of_its_own_has_one_projection_more() -> None:
    def projections(kind: str) -> int:
        forward, backward = product_flops(config(model__layers=[kind]), batch=2, seq=32)
        return 5 * forward - 2 * backward

    assert projections("full") == 3 * 2 * 2 * 32 * 16 * 16
    assert projections("full_standard") == 4 * 2 * 2 * 32 * 16 * 16


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_products_of_a_model_are_those_that_torch_counts(activation: str) -> None:
    settings: dict[str, Any] = {
        "attention__backend": "reference",
        "hashing": {"_target_": "reformer.Random"},  # needs no product
        "attention__chunk_length": 4,
        "attention__causality": "published",
        "model__n_layers": 3,
        "model__activation": activation,
    }

    def floors(residual: str) -> tuple[float, float]:
        made = trial_spec(**settings, model__residual=residual).reformer_config()
        forward, backward = model_floor_samples(made, batch=3, seq=32)
        return forward.values[0], backward.values[0]

    session = open_session(trial_spec(**settings, model__residual="plain"))
    with FlopCounterMode(display=False) as counter:
        session.loss(session.batch(0))
    forward, backward = floors("plain")
    assert forward == counter.get_total_flops()
    head = 2 * 3 * 32 * session.ours.config.joined_width * session.ours.config.vocab_size
    assert floors("reversible") == floors("checkpoint") == (forward, backward + forward - head)
    scores = 3 * 2 * 3 * 32 * 2 * 8 * 16  # layers, batch and tokens, rounds, window, width
    assert backward == 2 * forward + scores


def test_samples_have_phases() -> None:
    samples = floor_samples(config(), batch=3, seq=32)
    assert [(sample.metric, sample.phase, sample.unit) for sample in samples] == [
        ("floor_flops", "forward", "flop"),
        ("floor_flops", "backward", "flop"),
    ]
    assert [sample.values for sample in samples] == [
        (float(flops),) for flops in product_flops(config(), batch=3, seq=32)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rate_has_a_value_a_repetition(dtype: torch.dtype) -> None:
    rates = product_rates(config(), device=torch.device("cpu"), dtype=dtype)
    assert len(rates) == 30
    assert min(rates) > 0
