"""One block: an attention branch and a feed-forward branch on two residual streams."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.attention.modules import Attended, AttentionCall, build_attention
from reformer.config import ReformerConfig
from reformer.feed_forward import FeedForward


class Block(nn.Module):
    """y₁ = x₁ + Attention(Norm(x₂)); y₂ = x₂ + FeedForward(Norm(y₁)).

    Source: Kitaev, Kaiser, Levskaya 2020, §3 "Reversible Transformer".
    """

    def __init__(self, config: ReformerConfig, *, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.d_model)
        self.attention = build_attention(config, layer=layer)
        self.feed_forward_norm = nn.LayerNorm(config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.has_dropout = config.dropout > 0 or config.attention_dropout > 0

    def attend(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    ) -> Attended:
        """The attention branch, and the buckets it used."""
        attended = self.attention(self.attention_norm(x), call=call, buckets=buckets)
        return Attended(self.dropout(attended.out), attended.buckets)

    def feed(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """The feed-forward branch."""
        out: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out

    def attention_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the attention branch."""
        return _trainable(self.attention_norm, self.attention)

    def feed_forward_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of the feed-forward branch."""
        return _trainable(self.feed_forward_norm, self.feed_forward)


def _trainable(*modules: nn.Module) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
