"""The LSH layer of Hugging Face's transformers with the output projection that follows it, and the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from harness.peers.peer import PUBLISHED, PUBLISHED_MODEL, Peer, PeerModel, near_square
from reformer import ReformerConfig
from reformer.hashing import buckets

if TYPE_CHECKING:
    from harness.spec import TrialSpec


def build(spec: TrialSpec) -> nn.Module:
    """The layer of a spec that was checked; as many buckets as ours would have."""
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    ours = spec.reformer_config()
    output = nn.Linear(ours.n_heads * ours.head_width, ours.d_model, bias=False)
    return _Layer(LSHSelfAttention(_config(ours)), output)


def build_model(spec: TrialSpec) -> PeerModel:
    """The language model of a spec that was checked."""
    from transformers import ReformerModelWithLMHead

    return PeerModel(ReformerModelWithLMHead(_config(spec.reformer_config())), logits=_logits)


def _logits(model: nn.Module, tokens: Tensor) -> Tensor:
    out: Tensor = model(tokens).logits
    return out


def _config(ours: ReformerConfig) -> Any:
    from transformers import ReformerConfig as Theirs

    factors = buckets.factors(ours.bucket_count)
    return Theirs(
        vocab_size=ours.vocab_size,
        hidden_size=ours.d_model,
        feed_forward_size=ours.feed_forward_width,
        hidden_act=ours.activation,
        num_attention_heads=ours.n_heads,
        attention_head_size=ours.head_width,
        attn_layers=["lsh"] * ours.n_layers,
        lsh_attn_chunk_length=ours.chunk_length,
        lsh_num_chunks_before=ours.n_chunks_before,
        lsh_num_chunks_after=ours.lsh_options().after,
        num_hashes=ours.n_hashes,
        num_buckets=list(factors) if len(factors) > 1 else factors[0],
        is_decoder=True,
        max_position_embeddings=ours.max_length,
        axial_pos_embds=ours.positions == "axial",
        axial_pos_shape=near_square(ours.max_length),
        axial_pos_embds_dim=(ours.d_model // 2, ours.d_model - ours.d_model // 2),
        chunk_size_feed_forward=min(ours.ff_chunk_length or 0, ours.max_length),
        hidden_dropout_prob=ours.dropout,
        lsh_attention_probs_dropout_prob=ours.attention_dropout,
    )


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
    only_model={**PUBLISHED_MODEL, "model.merge": ("concat",)},
    chunks=1,
    build=build,
    build_model=build_model,
    whole_blocks=True,
)
