"""A model of two sequences: one is read from both sides, the other written from left to right."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reformer.config import ReformerConfig
from reformer.generation import evaluating, start_decode, write_on
from reformer.hashing.family import HashFamily
from reformer.heads import LanguageModelHead, Scores
from reformer.norms import build_norm
from reformer.sampling import Sampling
from reformer.streams import Streams
from reformer.trunk import Trunk


class Encoder(Trunk):
    """Reads the source: its merged streams, normalised."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config)
        self.norm = build_norm(config, width=config.joined_width)

    def forward(
        self, tokens: Int[Tensor, "batch source"], *, padding_mask: Bool[Tensor, "batch source"] | None
    ) -> Float[Tensor, "batch source width"]:
        """What the decoder attends to."""
        streams = self._run(tokens, padding_mask=padding_mask)
        encoded: Tensor = self.norm(streams.merged(self.config.merge))
        return encoded


class Decoder(Trunk):
    """Writes the target: causal blocks with a third branch, which attends to all of the source."""

    def __init__(self, config: ReformerConfig, *, source_width: int) -> None:
        super().__init__(config, source_width=source_width)
        self.head = LanguageModelHead(config, embedding=self.embedding)

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        source: Float[Tensor, "batch source width"],
        padding_mask: Bool[Tensor, "batch seq"] | None,
        source_padding_mask: Bool[Tensor, "batch source"] | None,
    ) -> Streams:
        """The streams that the head makes logits of."""
        return self._run(
            tokens, padding_mask=padding_mask, source=source, source_padding_mask=source_padding_mask
        )


class ReformerEncoderDecoder(nn.Module):
    """A bidirectional encoder, and a causal decoder that attends to what it read.

    Both are stacks of reversible blocks. Backward through the decoder recomputes its cross-attention too, and
    adds up over its blocks the gradient that the encoder gets.

    Args:
        config: of the decoder, causal.
        encoder: of the encoder, bidirectional; None is the decoder's, but not causal.

    Raises:
        ValueError: a decoder that is not causal, or an encoder that is.

    Source: Kitaev, Kaiser, Levskaya 2020, §5 "Reversible layers in machine translation".
    """

    def __init__(self, config: ReformerConfig, *, encoder: ReformerConfig | None = None) -> None:
        if not config.causal:
            raise ValueError("causal=False: a decoder would see what it predicts; use causal=True")
        if encoder is not None and encoder.causal:
            raise ValueError("encoder.causal=True: an encoder reads both sides of a token; use causal=False")
        super().__init__()
        self.encoder = Encoder(encoder if encoder is not None else replace(config, causal=False))
        self.decoder = Decoder(config, source_width=self.encoder.config.joined_width)

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        tokens: Int[Tensor, "batch seq"],
        *,
        source_padding_mask: Bool[Tensor, "batch source"] | None = None,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the next target token at every position.

        Args:
            source: token ids that are read, at most the encoder's `max_length` of them a row.
            tokens: target token ids so far, at most the decoder's `max_length` of them a row.
            source_padding_mask: True at real tokens of the source; nothing attends to the others.
            padding_mask: True at real tokens of the target.

        Raises:
            ValueError: more tokens than a `max_length`.
        """
        streams = self._decode(
            source, tokens, source_padding_mask=source_padding_mask, padding_mask=padding_mask
        )
        logits: Tensor = self.decoder.head(streams)
        return logits

    def loss(
        self,
        source: Int[Tensor, "batch source"],
        tokens: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        *,
        source_padding_mask: Bool[Tensor, "batch source"] | None = None,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats over targets ≠ −100, without ever holding all logits.

        Args:
            source: token ids that are read.
            tokens: target token ids, behind a start token as a rule.
            targets: what each position should predict; −100 where nothing is asked.
            source_padding_mask: True at real tokens of the source.
            padding_mask: True at real tokens of the target.

        Raises:
            ValueError: more tokens than a `max_length`.
        """
        streams = self._decode(
            source, tokens, source_padding_mask=source_padding_mask, padding_mask=padding_mask
        )
        return self.decoder.head.loss(streams, targets)

    @torch.no_grad()
    def score(
        self,
        source: Int[Tensor, "batch source"],
        tokens: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        *,
        source_padding_mask: Bool[Tensor, "batch source"] | None = None,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Scores:
        """Loss, hits and number of targets ≠ −100, summed over the batch; arguments as of `loss`.

        Raises:
            ValueError: more tokens than a `max_length`.
        """
        streams = self._decode(
            source, tokens, source_padding_mask=source_padding_mask, padding_mask=padding_mask
        )
        return self.decoder.head.score(streams, targets)

    def generate(
        self,
        source: Int[Tensor, "batch source"],
        tokens: Int[Tensor, "batch seq"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        source_padding_mask: Bool[Tensor, "batch source"] | None = None,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Int[Tensor, "batch max_new_tokens"]:
        """Write a target for each source, which is read once; see `ReformerLM.generate`.

        Args:
            source: token ids that are read.
            tokens: how the targets begin: a start token each as a rule.
            max_new_tokens: tokens to write in each row.
            temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
            top_k: draw from so many of the most likely tokens; None is all.
            top_p: then, from the fewest of the most likely that have this share of the chance; None is all.
            seed: of what is drawn. Each row has a stream of its own, of (seed, row).
            source_padding_mask: True at real tokens of the source.
            padding_mask: True at real tokens of the target.

        Raises:
            ValueError: names the value, the rule and the mend.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        with evaluating(self), torch.no_grad():
            state = start_decode(
                self.decoder,
                self.decoder.head,
                tokens,
                max_new_tokens=max_new_tokens,
                padding_mask=padding_mask,
                source=self.encoder(source, padding_mask=source_padding_mask),
                source_padding_mask=source_padding_mask,
            )
            return write_on(state, max_new_tokens=max_new_tokens, sampling=sampling)

    @contextmanager
    def attending(
        self,
        *,
        kind: str | None = None,
        n_hashes: int | None = None,
        hashing: HashFamily | None = None,
        hash_seed: int | None = None,
    ) -> Iterator[None]:
        """Let shared query-key layers of encoder and decoder attend otherwise; see `Trunk.attending`.

        Raises:
            ValueError: an unknown kind, or a family that cannot make a config's buckets.
        """
        with (
            self.encoder.attending(kind=kind, n_hashes=n_hashes, hashing=hashing, hash_seed=hash_seed),
            self.decoder.attending(kind=kind, n_hashes=n_hashes, hashing=hashing, hash_seed=hash_seed),
        ):
            yield

    def _decode(
        self,
        source: Int[Tensor, "batch source"],
        tokens: Int[Tensor, "batch seq"],
        *,
        source_padding_mask: Bool[Tensor, "batch source"] | None,
        padding_mask: Bool[Tensor, "batch seq"] | None,
    ) -> Streams:
        encoded = self.encoder(source, padding_mask=source_padding_mask)
        streams: Streams = self.decoder(
            tokens, source=encoded, padding_mask=padding_mask, source_padding_mask=source_padding_mask
        )
        return streams
