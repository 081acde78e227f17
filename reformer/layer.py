"""One block: attention and feed-forward branches on two residual streams."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.attention.modules import Attended, AttentionCall, CrossAttention, build_attention
from reformer.config import ReformerConfig
from reformer.feed_forward import FeedForward
from reformer.norms import build_norm


@dataclass(frozen=True, kw_only=True, eq=False)
class Branch:
    """What a block adds to one stream, computed from the other one.

    Args:
        block: whose branch it is.
        parts: its modules, but for dropout.
        function: from a stream, what the pass tells attention, and buckets that replace hashing.
    """

    block: "Block"
    parts: tuple[nn.Module, ...]
    function: Callable[[Tensor, AttentionCall, Tensor | None], Attended]

    def __call__(
        self,
        x: Float[Tensor, "batch seq d_model"],
        *,
        call: AttentionCall,
        buckets: Int[Tensor, "batch heads n_hashes seq"] | None = None,
    ) -> Attended:
        """The branch, and the buckets it used if it hashed."""
        return self.function(x, call, buckets)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those that need a gradient."""
        return [
            parameter for part in self.parts for parameter in part.parameters() if parameter.requires_grad
        ]


class Block(nn.Module):
    """y₁ = x₁ + Attention(Norm(x₂)); y₂ = x₂ + FeedForward(Norm(y₁)).

    With a source, three branches take turns on the two streams, so that the block exchanges them:
    y₁ = x₁ + Attention(Norm(x₂)); y₂ = x₂ + CrossAttention(Norm(y₁)); z₁ = y₁ + FeedForward(Norm(y₂)), and
    y₂ and z₁ are the first and the second stream of the next block.

    Args:
        config: of the model.
        layer: index of the block.
        source_width: of the sequence that a third branch attends to; None has no such branch.

    Source: Kitaev, Kaiser, Levskaya 2020, §3 "Reversible Transformer".
    """

    def __init__(self, config: ReformerConfig, *, layer: int, source_width: int | None = None) -> None:
        super().__init__()
        self.attention_norm = build_norm(config, width=config.d_model)
        self.attention = build_attention(config, layer=layer)
        if source_width is not None:
            self.cross_attention_norm = build_norm(config, width=config.d_model)
            self.cross_attention = CrossAttention(config, layer=layer, source_width=source_width)
        self.feed_forward_norm = build_norm(config, width=config.d_model)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.has_dropout = max(config.dropout, config.attention_dropout, config.local_dropout) > 0
        self.has_source = source_width is not None

    def branches(self) -> tuple[Branch, ...]:
        """The branches, in order."""
        attention = Branch(
            block=self,
            parts=(self.attention_norm, self.attention),
            function=lambda x, call, buckets: self.attend(x, call=call, buckets=buckets),
        )
        feed_forward = Branch(
            block=self,
            parts=(self.feed_forward_norm, self.feed_forward),
            function=lambda x, call, buckets: Attended(self.feed(x), None),
        )
        if not self.has_source:
            return attention, feed_forward
        cross_attention = Branch(
            block=self,
            parts=(self.cross_attention_norm, self.cross_attention),
            function=lambda x, call, buckets: Attended(self.look_up(x, call=call), None),
        )
        return attention, cross_attention, feed_forward

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

    def look_up(
        self, x: Float[Tensor, "batch seq d_model"], *, call: AttentionCall
    ) -> Float[Tensor, "batch seq d_model"]:
        """The branch that attends to the source."""
        out: Tensor = self.dropout(self.cross_attention(self.cross_attention_norm(x), call=call))
        return out

    def feed(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """The feed-forward branch."""
        out: Tensor = self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of the branches, in order."""
        return [parameter for branch in self.branches() for parameter in branch.trainable_parameters()]
