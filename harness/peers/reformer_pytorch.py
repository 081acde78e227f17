"""`LSHSelfAttention` and `ReformerLM` of lucidrains' reformer-pytorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from harness.peers.peer import PUBLISHED, PUBLISHED_MODEL, Peer, PeerModel, near_square

if TYPE_CHECKING:
    from harness.spec import TrialSpec


def build(spec: TrialSpec) -> nn.Module:
    """The layer of a spec that was checked."""
    from reformer_pytorch import LSHSelfAttention

    ours = spec.reformer_config()
    layer: nn.Module = LSHSelfAttention(
        dim=ours.d_model,
        heads=ours.n_heads,
        dim_head=ours.head_width,
        bucket_size=ours.chunk_length,
        n_hashes=ours.n_hashes,
        causal=True,
        dropout=ours.attention_dropout,
        drop_for_hash_rate=ours.hash_dropout,
    )
    return layer


def build_model(spec: TrialSpec) -> PeerModel:
    """The language model of a spec that was checked."""
    from reformer_pytorch import ReformerLM

    ours = spec.reformer_config()
    model = ReformerLM(
        num_tokens=ours.vocab_size,
        dim=ours.d_model,
        depth=ours.n_layers,
        heads=ours.n_heads,
        dim_head=ours.head_width,
        max_seq_len=ours.max_length,
        bucket_size=ours.chunk_length,
        n_hashes=ours.n_hashes,
        causal=True,
        ff_mult=ours.feed_forward_width // ours.d_model,
        ff_chunks=-(-ours.max_length // ours.ff_chunk_length) if ours.ff_chunk_length else 1,
        ff_dropout=ours.dropout,
        post_attn_dropout=ours.dropout,
        lsh_dropout=ours.attention_dropout,
        axial_position_emb=ours.positions == "axial",
        axial_position_shape=near_square(ours.max_length),
    )
    return PeerModel(model, logits=_logits)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    out: Tensor = model(tokens)
    return out


REFORMER_PYTORCH = Peer(
    name="reformer_pytorch",
    only={
        **PUBLISHED,
        "attention.logit_scale": ("sqrt_d",),
        "attention.n_buckets": (None,),
        "attention.n_chunks_before": (1,),
        "attention.n_chunks_after": (None, 0),
    },
    only_model={**PUBLISHED_MODEL, "model.merge": ("mean",)},
    chunks=2,
    build=build,
    build_model=build_model,
    multiplies_width=True,
)
