"""`LSHSelfAttention` of Hugging Face's transformers, with the output projection that follows it there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from harness.peers.peer import PUBLISHED, Peer
from reformer.hashing import buckets

if TYPE_CHECKING:
    from harness.spec import TrialSpec


def build(spec: TrialSpec) -> nn.Module:
    """The layer of a spec that was checked; as many buckets as ours would have."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    ours = spec.reformer_config()
    factors = buckets.factors(ours.bucket_count)
    config = ReformerConfig(
        hidden_size=ours.d_model,
        num_attention_heads=ours.n_heads,
        attention_head_size=ours.head_width,
        lsh_attn_chunk_length=ours.chunk_length,
        lsh_num_chunks_before=ours.n_chunks_before,
        lsh_num_chunks_after=ours.lsh_options().after,
        num_hashes=ours.n_hashes,
        num_buckets=list(factors) if len(factors) > 1 else factors[0],
        is_decoder=True,
        max_position_embeddings=ours.max_length,
        lsh_attention_probs_dropout_prob=ours.attention_dropout,
    )
    output = nn.Linear(ours.n_heads * ours.head_width, ours.d_model, bias=False)
    return _Layer(LSHSelfAttention(config), output)


class _Layer(nn.Module):
    def __init__(self, attention: Any, output: nn.Linear) -> None:
        super().__init__()
        self.attention = attention
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.output(self.attention(x).hidden_states)
        return out


TRANSFORMERS = Peer(
    name="transformers",
    only={**PUBLISHED, "attention.logit_scale": ("trax",), "attention.hash_dropout": (0.0,)},
    chunks=1,
    build=build,
)
