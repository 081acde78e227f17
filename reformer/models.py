"""Models of one sequence: language models and a classifier."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.config import ReformerConfig
from reformer.generation import DecodeState, evaluating, start_decode, write_on
from reformer.heads import ClassificationHead, LanguageModelHead, Scores
from reformer.randomness import RandomState
from reformer.sampling import Sampling
from reformer.stacks import gradient_cosine
from reformer.streams import Streams
from reformer.trunk import Trunk


class TokenModel(Trunk):
    """A prediction at every token; the language models differ in what a token sees, and in its target."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config)
        self.head = LanguageModelHead(config, embedding=self.embedding)

    def forward(
        self, tokens: Int[Tensor, "batch seq"], *, padding_mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocab"]:
        """Logits at every position.

        Args:
            tokens: token ids, at most `max_length` of them a row.
            padding_mask: True at real tokens; what stands at padding moves no real token's logits.

        Raises:
            ValueError: more tokens than `max_length`.
        """
        logits: Tensor = self.head(self._run(tokens, padding_mask=padding_mask))
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
        return self.head.loss(self._run(tokens, padding_mask=padding_mask), targets)

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
        return self.head.score(self._run(tokens, padding_mask=padding_mask), targets)

    def gradient_cosine(
        self,
        tokens: Int[Tensor, "batch seq"],
        targets: Int[Tensor, "batch seq"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, ""]:
        """Cosine between the loss's gradient as trained and the one from activations that were all kept.

        Over embeddings and blocks, under the current mode, autocast and hash draw; no state, no gradient and
        no random stream moves.

        Args:
            tokens: token ids.
            targets: what each position should predict; −100 where nothing is asked.
            padding_mask: True at real tokens.

        Raises:
            ValueError: more tokens than `max_length`.
            OverflowError: a stream too large for `reversible_exact`.
        """
        seq = tokens.shape[1]
        tokens, call = self._padded(tokens, call=self.attention_call(padding_mask=padding_mask))
        with RandomState.capture(tokens.device).replayed():
            return gradient_cosine(
                self._layers(),
                self._embed(tokens),
                objective=lambda y1, y2: self.head.loss(Streams(y1[:, :seq], y2[:, :seq]), targets),
                call=call,
                residual=self.config.residual,
                grid_bits=self.config.grid_bits,
            )


class ReformerLM(TokenModel):
    """A causal language model of Reformer blocks: every token predicts the next.

    Raises:
        ValueError: a config that lets tokens see later ones.
    """

    def __init__(self, config: ReformerConfig) -> None:
        if not config.causal:
            raise ValueError(
                "causal=False: a language model would see what it predicts; "
                "use causal=True or a ReformerMaskedLM"
            )
        super().__init__(config)

    def generate(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Int[Tensor, "batch max_new_tokens"]:
        """Write on from prompts; the new tokens alone, since prompts may differ in length.

        In eval mode, without gradients, under the settings of `attending`; no mode, no state and no global
        random stream moves. With `causality="strict"` a token costs the same at any length where attention is
        `lsh` or `local`; otherwise it costs a pass over all before it, and a `RecomputeWarning` says so.

        Args:
            tokens: prompts.
            max_new_tokens: tokens to write in each row.
            temperature: what logits are divided by before a token is drawn; 0 takes the most likely one.
            top_k: draw from so many of the most likely tokens; None is all.
            top_p: then, from the fewest of the most likely that have this share of the chance; None is all.
            seed: of what is drawn. Each row has a stream of its own, of (seed, row).
            padding_mask: True at real tokens. A row goes on right behind its last one, so with padding at its
                end it is written on as if it were alone and without padding; padding in front or in between
                keeps its positions, as in `forward`.

        Raises:
            ValueError: names the value, the rule and the mend.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        with evaluating(self):
            state = self.start_decode(tokens, max_new_tokens=max_new_tokens, padding_mask=padding_mask)
            return write_on(state, max_new_tokens=max_new_tokens, sampling=sampling)

    def start_decode(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        max_new_tokens: int,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> DecodeState:
        """Read prompts: the logits of their next tokens, and a way to append those. For eval mode.

        Args:
            tokens: prompts.
            max_new_tokens: most tokens that each row is continued by.
            padding_mask: True at real tokens, as in `generate`.

        Raises:
            ValueError: names the value, the rule and the mend.
        """
        return start_decode(self, self.head, tokens, max_new_tokens=max_new_tokens, padding_mask=padding_mask)


class ReformerMaskedLM(TokenModel):
    """A bidirectional language model: tokens that were hidden in the input are predicted where they stood.

    Raises:
        ValueError: a causal config.
    """

    def __init__(self, config: ReformerConfig) -> None:
        _check_bidirectional(config, "a masked language model")
        super().__init__(config)


class ReformerClassifier(Trunk):
    """A bidirectional model that reads the class of a sequence off its first real token.

    Raises:
        ValueError: a causal config, or one without `n_classes`.
    """

    def __init__(self, config: ReformerConfig) -> None:
        _check_bidirectional(config, "a classifier")
        if config.n_classes is None:
            raise ValueError("n_classes=None: a classifier has two classes at least; use n_classes=2 or more")
        super().__init__(config)
        self.head = ClassificationHead(config, n_classes=config.n_classes)

    def forward(
        self, tokens: Int[Tensor, "batch seq"], *, padding_mask: Bool[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits of the classes.

        Args:
            tokens: token ids, at most `max_length` of them a row and at least one.
            padding_mask: True at real tokens; what stands at padding moves nothing.

        Raises:
            ValueError: more tokens than `max_length`, or none.
        """
        logits: Tensor = self.head(self._pool(tokens, padding_mask=padding_mask))
        return logits.squeeze(1)

    def loss(
        self,
        tokens: Int[Tensor, "batch seq"],
        labels: Int[Tensor, " batch"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats over labels ≠ −100.

        Args:
            tokens: token ids.
            labels: the class of each sequence; −100 where it is not known.
            padding_mask: True at real tokens.

        Raises:
            ValueError: more tokens than `max_length`, or none.
        """
        return self.head.loss(self._pool(tokens, padding_mask=padding_mask), labels[:, None])

    @torch.no_grad()
    def score(
        self,
        tokens: Int[Tensor, "batch seq"],
        labels: Int[Tensor, " batch"],
        *,
        padding_mask: Bool[Tensor, "batch seq"] | None = None,
    ) -> Scores:
        """Loss, hits and number of labels ≠ −100, summed over the batch.

        Args:
            tokens: token ids.
            labels: the class of each sequence; −100 where it is not known.
            padding_mask: True at real tokens.

        Raises:
            ValueError: more tokens than `max_length`, or none.
        """
        return self.head.score(self._pool(tokens, padding_mask=padding_mask), labels[:, None])

    def _pool(
        self, tokens: Int[Tensor, "batch seq"], *, padding_mask: Bool[Tensor, "batch seq"] | None
    ) -> Streams:
        """The streams at the first real token of each row."""
        if tokens.shape[1] == 0:
            raise ValueError("seq=0: a class is read off a token; give one at least")
        streams = self._run(tokens, padding_mask=padding_mask)
        if padding_mask is None:
            return streams.each(lambda stream: stream[:, :1])
        first = padding_mask.int().argmax(dim=1)[:, None, None]
        return streams.each(lambda stream: stream.take_along_dim(first, dim=1))


def _check_bidirectional(config: ReformerConfig, what: str) -> None:
    if config.causal:
        raise ValueError(f"causal=True: {what} reads both sides of a token; use causal=False")
