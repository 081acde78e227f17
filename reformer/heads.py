"""Heads: from the two streams to logits, loss and scores, row block by row block."""

from abc import ABC, abstractmethod
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.blocks import sum_blocks
from reformer.config import ReformerConfig
from reformer.norms import build_norm
from reformer.streams import Streams

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

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, x: Float[Tensor, "batch rows width"]) -> Float[Tensor, "batch rows vocab"]:
        return F.linear(x, self.weight, self.bias)


class Head(nn.Module, ABC):
    """Merges the streams, normalises them, and makes logits of each row."""

    def __init__(self, config: ReformerConfig, *, block_length: int | None) -> None:
        super().__init__()
        self.block_length = block_length
        self.merge = config.merge
        self.norm = build_norm(config, width=config.joined_width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, streams: Streams) -> Float[Tensor, "batch rows classes"]:
        """Logits of every row at once."""
        return self.logits(streams.merged(self.merge), dropout_p=self._dropout_p)

    @abstractmethod
    def logits(
        self, joined: Float[Tensor, "batch rows width"], *, dropout_p: float
    ) -> Float[Tensor, "batch rows classes"]:
        """Logits, where that share of what enters a projection is dropped."""

    def loss(self, streams: Streams, targets: Int[Tensor, "batch seq"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats over the scored targets; 0 if there are none."""
        # Read here: a block that is computed again drops what it dropped, whatever the mode has become.
        dropout_p = self._dropout_p
        scored = (targets != IGNORED).sum().clamp(min=1)
        if self.block_length is None or self.block_length >= targets.shape[1]:
            joined = streams.merged(self.merge)
            # Nobody else may hold them, and joined they are there a second time.
            del streams
            return self._sum(joined, targets, dropout_p=dropout_p) / scored
        total = sum_blocks(
            partial(self._sum_rows, dropout_p=dropout_p),
            *streams,
            targets,
            parameters=self._depends_on(),
            length=self.block_length,
            random=dropout_p > 0,
        )
        return total / scored

    @torch.no_grad()
    def score(self, streams: Streams, targets: Int[Tensor, "batch seq"]) -> Scores:
        """Loss and hits, summed; logits of one block of rows at a time."""
        length = self.block_length or targets.shape[1]
        blocks = zip(*(x.split(length, dim=1) for x in (*streams, targets)), strict=True)
        nll_nats = torch.zeros((), dtype=torch.float64, device=targets.device)
        correct = torch.zeros((), dtype=torch.int64, device=targets.device)
        for first, second, wanted in blocks:
            logits = self(Streams(first, second)).float()
            nll_nats += F.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=IGNORED
            )
            correct += ((logits.argmax(dim=-1) == wanted) & (wanted != IGNORED)).sum()
        return Scores(nll_nats, correct, (targets != IGNORED).sum())

    def _depends_on(self) -> list[Tensor]:
        """What logits depend on beside the streams."""
        return list(self.parameters())

    @property
    def _dropout_p(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0

    def _sum_rows(
        self,
        first: Float[Tensor, "batch rows d_model"],
        second: Float[Tensor, "batch rows d_model"],
        targets: Int[Tensor, "batch rows"],
        *,
        dropout_p: float,
    ) -> Float[Tensor, ""]:
        return self._sum(Streams(first, second).merged(self.merge), targets, dropout_p=dropout_p)

    def _sum(
        self,
        joined: Float[Tensor, "batch rows width"],
        targets: Int[Tensor, "batch rows"],
        *,
        dropout_p: float,
    ) -> Float[Tensor, ""]:
        logits = self.logits(joined, dropout_p=dropout_p)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)


class LanguageModelHead(Head):
    """Projects every token to the vocabulary."""

    def __init__(self, config: ReformerConfig, *, embedding: nn.Embedding) -> None:
        super().__init__(config, block_length=config.loss_chunk_length)
        self.projection = (
            _TiedProjection(embedding)
            if config.tie_weights
            else nn.Linear(config.joined_width, config.vocab_size)
        )

    def _depends_on(self) -> list[Tensor]:
        tied = [self.projection.weight] if isinstance(self.projection, _TiedProjection) else []
        return [*self.parameters(), *tied]

    def logits(
        self, joined: Float[Tensor, "batch rows width"], *, dropout_p: float
    ) -> Float[Tensor, "batch rows vocab"]:
        logits: Tensor = self.projection(F.dropout(self.norm(joined), dropout_p))
        return logits


class ClassificationHead(Head):
    """Projects one token a sequence to the classes, through a layer of its own."""

    def __init__(self, config: ReformerConfig, *, n_classes: int) -> None:
        super().__init__(config, block_length=None)
        self.dense = nn.Linear(config.joined_width, config.d_model)
        self.projection = nn.Linear(config.d_model, n_classes)

    def logits(
        self, joined: Float[Tensor, "batch rows width"], *, dropout_p: float
    ) -> Float[Tensor, "batch rows classes"]:
        hidden = self.dense(F.dropout(self.norm(joined), dropout_p)).tanh()
        logits: Tensor = self.projection(F.dropout(hidden, dropout_p))
        return logits
