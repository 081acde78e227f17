"""The language-model head: logits, loss and scores, row block by row block."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.blocks import sum_blocks
from reformer.config import ReformerConfig

#: Targets of this value are not scored, as in `torch.nn.functional.cross_entropy`.
IGNORED = -100


class Scores(NamedTuple):
    """Sums over the scored targets of a batch."""

    nll_nats: Float[Tensor, ""]
    correct: Int[Tensor, ""]
    scored: Int[Tensor, ""]


class _TiedProjection(nn.Module):
    """Projects by the embedding's matrix, which stays the embedding's alone: one owner, once in the state."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        # In a tuple, since a module as an attribute would be registered a second time.
        self._embedding = (embedding,)
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))

    def forward(self, x: Float[Tensor, "batch rows width"]) -> Float[Tensor, "batch rows vocab"]:
        return F.linear(x, self._embedding[0].weight, self.bias)


class LanguageModelHead(nn.Module):
    """Joins the two streams, normalises, and projects to the vocabulary."""

    def __init__(self, config: ReformerConfig, *, embedding: nn.Embedding) -> None:
        super().__init__()
        width = 2 * config.d_model if config.merge == "concat" else config.d_model
        self.merge = config.merge
        self.block_length = config.loss_chunk_length
        self.norm = nn.LayerNorm(width)
        self.projection = (
            _TiedProjection(embedding) if config.tie_weights else nn.Linear(width, config.vocab_size)
        )

    def forward(self, joined: Float[Tensor, "batch rows width"]) -> Float[Tensor, "batch rows vocab"]:
        logits: Tensor = self.projection(self.norm(joined))
        return logits

    def join(
        self, y1: Float[Tensor, "batch seq d_model"], y2: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch seq width"]:
        """The two streams as one."""
        return torch.cat([y1, y2], dim=-1) if self.merge == "concat" else (y1 + y2) / 2

    def loss(
        self, joined: Float[Tensor, "batch seq width"], targets: Int[Tensor, "batch seq"]
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats over the scored targets; 0 if there are none."""
        total = sum_blocks(self._sum, joined, targets, length=self.block_length)
        return total / (targets != IGNORED).sum().clamp(min=1)

    @torch.no_grad()
    def score(self, joined: Float[Tensor, "batch seq width"], targets: Int[Tensor, "batch seq"]) -> Scores:
        """Loss and hits, summed; logits of one block of rows at a time."""
        length = self.block_length or joined.shape[1]
        blocks = zip(joined.split(length, dim=1), targets.split(length, dim=1), strict=True)
        nll_nats = torch.zeros((), dtype=torch.float64, device=joined.device)
        correct = torch.zeros((), dtype=torch.int64, device=joined.device)
        for rows, wanted in blocks:
            logits = self(rows).float()
            nll_nats += F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=IGNORED
            )
            correct += ((logits.argmax(dim=-1) == wanted) & (wanted != IGNORED)).sum()
        return Scores(nll_nats, correct, (targets != IGNORED).sum())

    def _sum(
        self, joined: Float[Tensor, "batch rows width"], targets: Int[Tensor, "batch rows"]
    ) -> Float[Tensor, ""]:
        logits = self(joined)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
