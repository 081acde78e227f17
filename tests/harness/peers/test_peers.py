"""Layers from elsewhere: what they refuse, and that the settings of a spec reach them."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import Any

import pytest
import torch
from torch import nn

from harness.codec import SpecError
from harness.peers import PEERS
from harness.workloads.attention import open_layer
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
