"""`LSHSelfAttention` of lucidrains' reformer-pytorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from harness.peers.peer import PUBLISHED, Peer

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


REFORMER_PYTORCH = Peer(
    name="reformer_pytorch",
    only={
        **PUBLISHED,
        "attention.logit_scale": ("sqrt_d",),
        "attention.n_buckets": (None,),
        "attention.n_chunks_before": (1,),
        "attention.n_chunks_after": (None, 0),
    },
    chunks=2,
    build=build,
)
