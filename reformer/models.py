"""The Reformer language model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reformer.attention.modules import Attending, AttentionCall
from reformer.config import ReformerConfig
from reformer.hashing.family import HashFamily
from reformer.heads import LanguageModelHead, Scores
from reformer.layer import Block
from reformer.positions import build_positions
from reformer.stacks import run_stack


class ReformerLM(nn.Module):
    """A causal language model of Reformer blocks.

    Hash rotations come from the config's `hash_seed`, the layer and a counter that goes up by one each
    training forward; the global random stream serves initialisation and dropout alone.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        self.positions = build_positions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer=layer) for layer in range(config.n_layers))
        self.head = LanguageModelHead(config, embedding=self.embedding)
        self._draw = 0
        self._attending = Attending()

    def forward(
        self, tokens: Int[Tensor, "batch seq"], *, padding_mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next token at every position.

        Args:
            tokens: token ids, at most `max_length` of them a row.
            padding_mask: True at real tokens; what stands at padding moves no real token's logits.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        logits: Tensor = self.head(self._join(tokens, padding_mask=padding_mask))
        return logits

    def loss(
        self,
        tokens: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats over targets ≠ −100, without ever holding all logits.

        Args:
            tokens: token ids.
            targets: what each position should predict; −100 where nothing is asked.
            padding_mask: True at real tokens.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        return self.head.loss(self._join(tokens, padding_mask=padding_mask), targets)

    @torch.no_grad()
    def score(
        self,
        tokens: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Scores:
        """Loss, hits and number of targets ≠ −100, summed over the batch.

        Args:
            tokens: token ids.
            targets: what each position should predict; −100 where nothing is asked.
            padding_mask: True at real tokens.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        return self.head.score(self._join(tokens, padding_mask=padding_mask), targets)

    @contextmanager
    def attending(
        self,
        *,
        kind: str | None = None,
        n_hashes: int | None = None,
        hashing: HashFamily | None = None,
        hash_seed: int | None = None,
    ) -> Iterator[None]:
        """Let shared query-key layers attend otherwise, on the same weights, in eval and train mode.

        Args:
            kind: `lsh`, `full`, or a control: `random` buckets, `knock_out`.
            n_hashes: hash rounds.
            hashing: hash family.
            hash_seed: where rotations are drawn from.

        Raises:
            ValueError: an unknown kind, or a family that cannot make the config's buckets.
        """
        before = self._attending
        if n_hashes is not None:
            self.config.lsh_options(n_hashes=n_hashes)
        if hashing is not None:
            hashing.check(self.config.bucket_count)
        given: dict[str, Any] = {
            "kind": kind,
            "n_hashes": n_hashes,
            "hashing": hashing,
            "hash_seed": hash_seed,
        }
        self._attending = replace(
            before, **{name: value for name, value in given.items() if value is not None}
        )
        try:
            yield
        finally:
            self._attending = before

    def get_extra_state(self) -> dict[str, Tensor]:
        """The hash draw counter, so that a resumed training draws on."""
        return {"draw": torch.tensor(self._draw)}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self._draw = int(state["draw"])

    def _join(
        self, tokens: Int[Tensor, "batch seq"], *, padding_mask: Bool[Tensor, "batch seq"] | None
    ) -> Float[Tensor, "batch seq width"]:
        seq = tokens.shape[1]
        if seq > self.config.max_length:
            raise ValueError(
                f"seq={seq}: longer than max_length={self.config.max_length}; "
                f"build the model with max_length={seq}"
            )
        if self.training:
            self._draw += 1
        call = AttentionCall(draw=self._draw, attending=self._attending, padding_mask=padding_mask)
        x = self.dropout(self.embedding(tokens) + self.positions(seq))
        y1, y2 = run_stack(
            [block for block in self.blocks if isinstance(block, Block)],
            x,
            call=call,
            residual=self.config.residual,
        )
        return self.head.join(y1, y2)
