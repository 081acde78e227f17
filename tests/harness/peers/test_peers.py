"""Layers from elsewhere: what they refuse, and that the settings of a spec reach them."""

from __future__ import annotations

import importlib.util
import math
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn

from harness.codec import SpecError
from harness.peers import PEERS
from harness.peers.peer import near_square
from harness.probes import Blind
from harness.workloads.attention import open_layer
from harness.workloads.session import open_session
from reformer.attention.modules import AttentionCall, SharedQueryKeyAttention
from tests.harness.specs import trial_spec

PUBLISHED = {
    "attention__causality": "published",
    "attention__duplicates": "sum",
    "attention__seams": "reference",
}
SETTINGS: dict[str, dict[str, Any]] = {
    "transformers": {**PUBLISHED, "attention__logit_scale": "trax"},
    "reformer_pytorch": {**PUBLISHED, "attention__logit_scale": "sqrt_d", "attention__n_buckets": None},
}


def spec_of(peer: str, **settings: Any) -> Any:
    workload = {"_target_": "harness.workloads.attention.Attention", "implementation": peer}
    return trial_spec(**{**SETTINGS[peer], "workload": workload, **settings})


def layer_of(peer: str, **settings: Any) -> nn.Module:
    return open_layer(spec_of(peer, **settings), implementation=peer).layer


@pytest.mark.parametrize("peer", PEERS)
def test_a_layer_maps_a_sequence_to_one_of_its_shape_and_has_gradients(peer: str) -> None:
    session = open_layer(spec_of(peer), implementation=peer)
    out = session.forward(session.inputs)
    assert out.shape == session.inputs.shape == (3, 32, 16)
    out.backward(session.gradient)
    assert session.inputs.grad is not None
    assert all(parameter.grad is not None for parameter in session.layer.parameters())


MODELS: dict[str, dict[str, Any]] = {
    peer: {**settings, "model__residual": "reversible", "model__merge": merge, "model__d_ff": 32}
    for (peer, settings), merge in zip(SETTINGS.items(), ("concat", "mean"), strict=True)
}


def model_spec(peer: str, **settings: Any) -> Any:
    workload = {"_target_": "harness.workloads.train_step.TrainStep", "implementation": peer}
    return trial_spec(**{**MODELS[peer], "workload": workload, **settings})


@pytest.mark.parametrize("positions", ["axial", "learned"])
@pytest.mark.parametrize("peer", PEERS)
def test_a_model_is_trained_as_ours_is(peer: str, positions: str) -> None:
    spec = model_spec(peer, model__positions=positions)
    session = open_session(spec, implementation=peer)
    batch = session.batch(0)
    losses = [float(session.train_step(batch, step=step, probe=Blind())) for step in range(12)]
    assert losses[0] == pytest.approx(math.log(spec.task.vocab_size), rel=0.5)
    assert losses[-1] < losses[0]
    same, other = (open_session(spec, implementation=peer) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(same.model.parameters(), other.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("rows", [8, 64])
@pytest.mark.parametrize("peer", PEERS)
def test_a_model_takes_blocks_of_rows(peer: str, rows: int) -> None:
    session = open_session(model_spec(peer, model__ff_chunk_length=rows), implementation=peer)
    session.train_step(session.batch(0), step=0, probe=Blind())


@pytest.mark.parametrize("peer", PEERS)
def test_a_model_has_the_sizes_of_the_spec(peer: str) -> None:
    settings = {"model__n_layers": 3, "model__d_ff": 48, "model__positions": "learned"}
    peers = open_session(model_spec(peer, **settings), implementation=peer).model
    ours = open_session(model_spec(peer, **settings)).model
    theirs = sum(parameter.numel() for parameter in peers.parameters())
    # They differ in biases and in what stands before and behind the blocks.
    assert theirs == pytest.approx(sum(parameter.numel() for parameter in ours.parameters()), rel=0.1)


@pytest.mark.parametrize(
    ("peer", "key", "value", "message"),
    [
        ("transformers", "model__residual", "plain", "use model.residual=reversible"),
        ("transformers", "model__merge", "mean", "use model.merge=concat"),
        ("reformer_pytorch", "model__merge", "concat", "use model.merge=mean"),
        ("reformer_pytorch", "model__d_ff", 24, "has a multiple of model.d_model; use model.d_ff=64"),
        ("transformers", "model__positions", "sinusoidal", "use model.positions=axial"),
        ("transformers", "model__ff_chunk_length", 12, "use a divisor of task.length=32"),
        ("transformers", "model__heads_at_once", 1, "use model.heads_at_once=null"),
        ("transformers", "model__layers", ["lsh", "full"], "are built as lsh here; use model.layers=[lsh]"),
        ("reformer_pytorch", "model__max_length", 64, "trains at its full length; use model.max_length=null"),
        ("reformer_pytorch", "attention__causality", "strict", "use attention.causality=published"),
    ],
)
def test_what_a_peer_s_model_does_not_compute_is_refused(
    peer: str, key: str, value: Any, message: str
) -> None:
    settings = {"model__positions": "axial", "model__n_layers": 2, key: value}
    with pytest.raises(SpecError) as caught:
        model_spec(peer, **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("length", "factors"), [(1, (1, 1)), (12, (3, 4)), (4096, (64, 64)), (8192, (64, 128)), (13, (1, 13))]
)
def test_positions_lie_on_the_most_square_grid_of_their_number(length: int, factors: tuple[int, int]) -> None:
    assert near_square(length) == factors


@pytest.mark.parametrize(
    ("peer", "key", "value", "message"),
    [
        (
            "transformers",
            "attention__causality",
            "strict",
            "attention.causality=strict: transformers computes",
        ),
        ("transformers", "attention__duplicates", "count", "use attention.duplicates=sum"),
        ("transformers", "attention__seams", "masked", "use attention.seams=reference"),
        ("transformers", "attention__logit_scale", "sqrt_d", "use attention.logit_scale=trax"),
        ("transformers", "attention__hash_dropout", 0.1, "use attention.hash_dropout=0"),
        ("transformers", "attention__backend", "reference", "use attention.backend=auto"),
        ("transformers", "model__positions", "rotary", "model.positions=rotary: transformers"),
        ("transformers", "hashing", {"_target_": "reformer.Hyperplane"}, "use hashing=cross_polytope"),
        ("transformers", "model__layers", ["full"], "attention=full: transformers is an LSH layer"),
        (
            "transformers",
            "task__length",
            36,
            "multiples of 8 tokens, more than a chunk of 8; use task.length=40",
        ),
        ("transformers", "task__length", 8, "use task.length=16"),
        ("reformer_pytorch", "attention__logit_scale", "trax", "use attention.logit_scale=sqrt_d"),
        ("reformer_pytorch", "attention__n_buckets", 4, "use attention.n_buckets=null"),
        ("reformer_pytorch", "attention__n_chunks_before", 2, "use attention.n_chunks_before=1"),
        ("reformer_pytorch", "attention__n_chunks_after", 1, "use attention.n_chunks_after=null"),
        ("reformer_pytorch", "task__length", 40, "multiples of 16 tokens"),
    ],
)
def test_what_a_peer_does_not_compute_is_refused(peer: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(peer, **{key: value})
    assert message in str(caught.value)


@pytest.mark.parametrize("peer", PEERS)
def test_without_its_package_the_extra_is_named(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SpecError, match=rf"workload\.implementation={peer}: .* not installed; install"
    ) as caught:
        spec_of(peer)
    assert ".[peers]" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_reach_transformers() -> None:
    layer: Any = layer_of(
        "transformers",
        attention__n_hashes=3,
        attention__n_buckets=[2, 4],
        attention__chunk_length=4,
        attention__n_chunks_before=2,
        attention__n_chunks_after=1,
        model__n_heads=2,
        model__d_head=5,
        model__attention_dropout=0.25,
    )
    inner = layer.attention
    assert (inner.num_hashes, inner.num_buckets, inner.chunk_length) == (3, [2, 4], 4)
    assert (inner.num_chunks_before, inner.num_chunks_after, inner.is_decoder) == (2, 1, True)
    assert (inner.num_attention_heads, inner.attention_head_size, inner.hidden_size) == (2, 5, 16)
    assert inner.dropout == 0.25


def test_settings_reach_reformer_pytorch() -> None:
    layer: Any = layer_of(
        "reformer_pytorch",
        attention__n_hashes=3,
        attention__chunk_length=4,
        attention__hash_dropout=0.5,
        model__d_head=5,
        model__attention_dropout=0.25,
    )
    inner = layer.lsh_attn
    assert (inner.n_hashes, inner.bucket_size, inner.causal) == (3, 4, True)
    assert (layer.heads, layer.dim_head, layer.dim) == (2, 5, 16)
    assert (inner.dropout.p, inner.dropout_for_hash.p) == (0.25, 0.5)


def test_transformers_computes_what_its_settings_say() -> None:
    """One round in which every token has one bucket, so that no rotation matters: ours gives the same."""
    spec = spec_of("transformers", attention__n_hashes=1, attention__n_buckets=2, attention__chunk_length=16)
    peer: Any = open_layer(spec, implementation="transformers").layer
    ours = SharedQueryKeyAttention(spec.reformer_config(), layer=0)
    with torch.no_grad():
        ours.query_key.weight.copy_(peer.attention.query_key.weight)
        ours.value.weight.copy_(peer.attention.value.weight)
        ours.output.weight.copy_(peer.output.weight)
    x = torch.randn(3, 32, 16, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(3, 2, 1, 32, dtype=torch.int64)
    hidden = peer.attention(x, buckets=ids.flatten(2)).hidden_states
    torch.testing.assert_close(
        peer.output(hidden), ours(x, call=AttentionCall(), buckets=ids).out, rtol=1e-4, atol=1e-5
    )


def test_versions_are_known() -> None:
    assert [peer.version for peer in PEERS.values()] == [
        metadata.version("transformers"),
        metadata.version("reformer-pytorch"),
    ]
