"""One block: attention and feed-forward branches on two residual streams."""

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.attention.head_groups import HeadGroups
from reformer.attention.modules import Attended, AttentionCall, CrossAttention, build_attention
from reformer.blocks import map_blocks
from reformer.branch import Branch
from reformer.config import ReformerConfig
from reformer.feed_forward import FeedForward
from reformer.norms import build_norm


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
        self.row_block = config.ff_chunk_length
        self.heads_at_once = config.heads_at_once
        self.dropout = nn.Dropout(config.dropout)
        self.has_dropout = max(config.dropout, config.attention_dropout, config.local_dropout) > 0
        self.has_source = source_width is not None

    def branches(self) -> tuple[Branch, ...]:
        """The branches, in order."""
        attention = Branch(
            block=self,
            parts=(self.attention_norm, self.attention),
            function=lambda x, call, buckets: self.attend(x, call=call, buckets=buckets),
            head_groups=self.head_groups(),
        )
        feed_forward = Branch(
            block=self,
            parts=(self.feed_forward_norm, self.feed_forward),
            function=lambda x, call, buckets: Attended(self.feed(x), None),
            row_block=self.row_block,
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
        groups = self.head_groups()
        if groups is not None and groups.serve(call) and not torch.is_grad_enabled():
            return groups(x, call=call, buckets=buckets)
        attended = self.attention(self.attention_norm(x), call=call, buckets=buckets)
        return Attended(self.dropout(attended.out), attended.buckets)

    def look_up(
        self, x: Float[Tensor, "batch seq d_model"], *, call: AttentionCall
    ) -> Float[Tensor, "batch seq d_model"]:
        """The branch that attends to the source."""
        out: Tensor = self.dropout(self.cross_attention(self.cross_attention_norm(x), call=call))
        return out

    def feed(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """The feed-forward branch: with `ff_chunk_length`, of so many rows at a time in either pass."""
        # Read here: a block that is computed again drops what it dropped, whatever the mode has become.
        rows = partial(self._feed_rows, dropout_p=self._dropout_p)
        return map_blocks(rows, x, length=self.row_block, random=self._dropout_p > 0)

    def head_groups(self) -> HeadGroups | None:
        """The attention branch some heads at a time, if the config asks for it."""
        if self.heads_at_once is None or self.heads_at_once >= self.attention.config.n_heads:
            return None
        return HeadGroups(
            norm=self.attention_norm,
            attention=self.attention,
            heads_at_once=self.heads_at_once,
            dropout_p=self._dropout_p,
        )

    @property
    def _dropout_p(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0

    def _feed_rows(
        self, x: Float[Tensor, "batch rows d_model"], *, dropout_p: float
    ) -> Float[Tensor, "batch rows d_model"]:
        out: Tensor = self.feed_forward(self.feed_forward_norm(x), dropout_p=dropout_p)
        return F.dropout(out, dropout_p)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Those of the branches, in order."""
        return [parameter for branch in self.branches() for parameter in branch.trainable_parameters()]
