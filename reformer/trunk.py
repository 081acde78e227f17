"""What all models have below their heads: embeddings, blocks, the hash draw, and other ways to attend."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reformer.attention.modules import Attending, AttentionCall
from reformer.attention.options import check_hashing
from reformer.compilation import uncompiled
from reformer.config import ReformerConfig
from reformer.hashing.family import HashFamily
from reformer.layer import Block
from reformer.lifting import build_lifting
from reformer.positions import build_positions
from reformer.randomness import RandomState
from reformer.reversible import reconstruction_errors
from reformer.stacks import run_stack
from reformer.streams import Streams


class Trunk(nn.Module):
    """From tokens to the two streams; models add a head and a `forward`.

    Hash rotations come from the config's `hash_seed`, the layer and a counter that goes up by one each
    training forward; the global random stream serves initialisation and dropout alone.

    Args:
        config: of the model.
        source_width: of a second sequence that every block attends to; None if there is none.
    """

    def __init__(self, config: ReformerConfig, *, source_width: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        self.positions = build_positions(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config, layer=layer, source_width=source_width) for layer in range(config.n_layers)
        )
        self._draw = 0
        self._attending = Attending()

    @torch.no_grad()
    def reconstruction_errors(
        self, tokens: Int[Tensor, "batch seq"], *, padding_mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, " layers"]:
        """How far off each block's inputs are when they are recomputed from the last block's outputs.

        Measured under the current mode, autocast and hash draw; no state and no random stream moves. 0
        throughout for `reversible_exact`; for the other residual kinds, what `reversible` has.

        Args:
            tokens: token ids.
            padding_mask: True at real tokens.

        Raises:
            ValueError: more tokens than `max_length`.
            OverflowError: a stream too large for `reversible_exact`.
        """
        tokens, call = self._padded(tokens, call=self.attention_call(padding_mask=padding_mask))
        with RandomState.capture(tokens.device).replayed():
            return reconstruction_errors(
                self._layers(),
                self._embed(tokens),
                call=call,
                lifting=build_lifting(self.config.residual, grid_bits=self.config.grid_bits),
            )

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
            kind: `lsh`, `full`, or a control: the `oracle`, `random` buckets, `knock_out`.
            n_hashes: hash rounds.
            hashing: hash family.
            hash_seed: where rotations are drawn from.

        Raises:
            ValueError: an unknown kind, or a family that cannot make the config's buckets.
        """
        before = self._attending
        options = self.config.lsh_options(n_hashes=n_hashes)
        if hashing is not None:
            check_hashing(
                hashing, options=options, n_buckets=self.config.bucket_count, dim=self.config.head_width
            )
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

    def attention_call(self, *, padding_mask: Bool[Tensor, "batch seq"] | None = None) -> AttentionCall:
        """What a pass tells attention under the current settings and hash draw."""
        return AttentionCall(draw=self._draw, attending=self._attending, padding_mask=padding_mask)

    def advance(self, tokens: Int[Tensor, "batch seq"], *, call: AttentionCall) -> Streams:
        """The streams of tokens in the pass that `call` describes; no new hash draw.

        Padding that the config's conventions ask for is appended, and left away again.

        Args:
            tokens: token ids, at most `max_length` of them a row.
            call: what attention is told, positions and caches of a decode among it.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        seq = tokens.shape[1]
        tokens, call = self._padded(tokens, call=call)
        streams = self._run_blocks(self._embed(tokens, positions=call.positions), call=call)
        return streams.each(lambda stream: stream[:, :seq]) if seq < tokens.shape[1] else streams

    def get_extra_state(self) -> dict[str, Tensor]:
        """The hash draw counter, so that a resumed training draws on."""
        return {"draw": torch.tensor(self._draw)}

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        self._draw = int(state["draw"])

    def _run(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None,
        source: Float[Tensor, "batch source source_width"] | None = None,
        source_padding_mask: Bool[Tensor, "batch source"] | None = None,
    ) -> Streams:
        """The streams behind the last block."""
        self._check_length(tokens.shape[1])
        # Compiled, it would be compiled again for every value of the counter.
        call = uncompiled(self._next_call)(padding_mask)
        return self.advance(
            tokens, call=replace(call, source=source, source_padding_mask=source_padding_mask)
        )

    def _padded(
        self, tokens: Int[Tensor, "batch seq"], *, call: AttentionCall
    ) -> tuple[Int[Tensor, "batch padded"], AttentionCall]:
        """Tokens and call with the padding that transformers appends; our own conventions have none."""
        batch, seq = tokens.shape
        self._check_length(seq)
        missing = self.config.padded_length(seq) - seq
        if not missing:
            return tokens, call
        real = call.padding_mask
        if real is None:
            real = torch.ones(batch, seq, dtype=torch.bool, device=tokens.device)
        return F.pad(tokens, (0, missing)), replace(call, padding_mask=F.pad(real, (0, missing)))

    def _run_blocks(self, x: Float[Tensor, "batch seq d_model"], *, call: AttentionCall) -> Streams:
        streams = run_stack(
            self._layers(),
            x,
            call=call,
            residual=self.config.residual,
            grid_bits=self.config.grid_bits,
        )
        return Streams(*streams)

    def _embed(
        self, tokens: Int[Tensor, "batch seq"], *, positions: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq d_model"]:
        seq = tokens.shape[1]
        x: Tensor = self.embedding(tokens)
        if self.positions is not None:
            x = x + (self.positions(seq) if positions is None else self.positions.at(positions))
        dropped: Tensor = self.dropout(x)
        return dropped

    def _check_length(self, seq: int) -> None:
        if seq > self.config.max_length:
            raise ValueError(
                f"seq={seq}: longer than max_length={self.config.max_length}; "
                f"build the model with max_length={seq}"
            )
        if seq > self.config.longest_input:
            padded = self.config.padded_length(seq)
            raise ValueError(
                f"seq={seq}: padded to {padded}, a multiple of {self.config.length_multiple} as in "
                f"transformers, longer than max_length={self.config.max_length}; give at most "
                f"{self.config.longest_input} tokens, or build the model with max_length={padded}"
            )

    def _next_call(self, padding_mask: Bool[Tensor, "batch seq"] | None) -> AttentionCall:
        if self.training:
            self._draw += 1
        return self.attention_call(padding_mask=padding_mask)

    def _layers(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]
