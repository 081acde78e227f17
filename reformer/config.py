"""Everything that defines a Reformer, as plain values."""

from dataclasses import dataclass
from math import lcm

import torch

from reformer.attention.options import LSHOptions, at_least, check_hashing, one_of
from reformer.attention.oracle import LONGEST as LONGEST_ORACLE
from reformer.hashing import buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.cross_polytope import CrossPolytope
from reformer.hashing.family import HashFamily

ATTENTION_KINDS = ("lsh", "local", "full", "full_standard", "oracle")
RESIDUALS = ("plain", "checkpoint", "reversible", "reversible_exact")
POSITIONS = ("learned", "axial", "sinusoidal", "rotary")
NORMS = ("layer_norm", "rms_norm")
ACTIVATIONS = ("gelu", "relu", "swiglu", "geglu")
MERGES = ("concat", "mean")
CONVENTIONS = ("own", "transformers")


@dataclass(frozen=True, kw_only=True)
class ReformerConfig:
    """A Reformer, from integers and words alone.

    Args:
        vocab_size: number of token ids.
        max_length: longest sequence, in tokens; also fixes the automatic bucket count.
        d_model: width of each residual stream.
        d_ff: width of the feed-forward layer, of each of its two factors if it is gated; None is 4·d_model.
        n_heads: attention heads.
        d_head: width of a head; None is d_model / n_heads.
        n_layers: blocks of one attention and one feed-forward.
        layers: attention kinds (`lsh`, `local`, `full`, `full_standard`, `oracle`), repeated to `n_layers`.
        causal: a token sees no later one; False for models that read both sides.
        n_hashes, n_buckets, chunk_length, n_chunks_before, n_chunks_after, causality, duplicates, seams,
        logit_scale, bucket_mask, hashing, backend: of `lsh` layers, see `reformer.lsh_attention`. `oracle`
        layers see as many keys as the chunks before and after would show in all rounds.
        hash_dropout: of the vectors that are hashed, in training; attention itself sees them whole.
        local_chunk_length: tokens a chunk of `local` layers; None is `chunk_length`.
        local_n_chunks_before: earlier chunks that `local` layers see.
        local_n_chunks_after: later ones; None is 0 if causal, else 1.
        residual: what is kept for backward: `plain` every activation, `checkpoint` the inputs of each block,
            `reversible` the outputs of the last one, `reversible_exact` too, on a grid where sums are exact.
        grid_bits: binary places that `reversible_exact` rounds embeddings and branches to; its streams must
            stay below 2^(23 − grid_bits).
        positions: `learned`, `axial` (two factors, any length up to their product), `sinusoidal`, or `rotary`
            (queries and keys are turned by their position, before they are hashed).
        axial_shape: the two factors of the position grid; None is near √max_length.
        axial_dims: how d_model is divided over them; None is in halves.
        norm: `layer_norm`, or `rms_norm` (no mean, no bias).
        norm_eps: added to the variance or mean square.
        activation: of the feed-forward layer: `gelu`, `relu`, or gated by a third matrix, `swiglu`, `geglu`.
        dropout: of embeddings, of every branch, inside the feed-forward layer, and around a classifier's.
        attention_dropout: of attention weights.
        local_attention_dropout: of those of `local` layers; None is `attention_dropout`.
        heads_at_once: heads whose queries, keys, values and outputs exist at once where none of them is kept
            (backward of `reversible`, and passes without gradients); None is all.
        ff_chunk_length: rows of the feed-forward layer at once; None is all.
        loss_chunk_length: rows of logits at once in the loss; None is all.
        tie_weights: the head uses the embedding's matrix.
        merge: how the two streams end: `concat` or `mean`.
        n_classes: of a `ReformerClassifier`; other models have none.
        conventions: `own`, or what Hugging Face `transformers` does beyond the settings above, for weights
            from there: a sequence longer than the smallest chunk is padded to a common multiple of all chunk
            lengths, `lsh` layers see every pair where it fits into one chunk, `local` windows wrap around,
            and all layers draw the same rotation at every step.
        hash_seed: where hash rotations are drawn from; apart from every other random stream.
        embedding_std: standard deviation of token and position embeddings at the start. One scale for both:
            with N(0, 1) tokens and N(0, 0.02²) positions the duplication task is not learnt.

    Raises:
        ValueError: names the value, the rule and the mend.
    """

    vocab_size: int
    max_length: int
    d_model: int = 256
    d_ff: int | None = None
    n_heads: int = 4
    d_head: int | None = None
    n_layers: int = 2
    layers: tuple[str, ...] = ("lsh",)
    causal: bool = True
    n_hashes: int = 4
    n_buckets: Buckets | None = None
    chunk_length: int = 64
    n_chunks_before: int = 1
    n_chunks_after: int | None = None
    causality: str = "strict"
    duplicates: str = "count"
    seams: str = "masked"
    logit_scale: str = "trax"
    bucket_mask: bool | None = None
    hashing: HashFamily = CrossPolytope()
    hash_dropout: float = 0.0
    backend: str = "auto"
    local_chunk_length: int | None = None
    local_n_chunks_before: int = 1
    local_n_chunks_after: int | None = None
    residual: str = "reversible"
    grid_bits: int = 16
    positions: str = "learned"
    axial_shape: tuple[int, int] | None = None
    axial_dims: tuple[int, int] | None = None
    norm: str = "layer_norm"
    norm_eps: float = 1e-5
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    local_attention_dropout: float | None = None
    heads_at_once: int | None = None
    ff_chunk_length: int | None = None
    loss_chunk_length: int | None = None
    tie_weights: bool = False
    merge: str = "concat"
    n_classes: int | None = None
    conventions: str = "own"
    hash_seed: int = 0
    embedding_std: float = 0.16

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_length", "d_model", "n_heads", "n_layers"):
            at_least(name, getattr(self, name), 1)
        for name in (
            "d_ff",
            "d_head",
            "heads_at_once",
            "ff_chunk_length",
            "loss_chunk_length",
            "local_chunk_length",
        ):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        at_least("local_n_chunks_before", self.local_n_chunks_before, 0)
        if self.local_n_chunks_after is not None:
            at_least("local_n_chunks_after", self.local_n_chunks_after, 0)
        if self.n_classes is not None:
            at_least("n_classes", self.n_classes, 2)
        one_of("residual", self.residual, RESIDUALS)
        if not 8 <= self.grid_bits <= 20:
            raise ValueError(
                f"grid_bits={self.grid_bits}: streams are rounded to 2^-grid_bits and stay below "
                "2^(23-grid_bits); give 8 ≤ grid_bits ≤ 20"
            )
        one_of("positions", self.positions, POSITIONS)
        one_of("norm", self.norm, NORMS)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("merge", self.merge, MERGES)
        one_of("conventions", self.conventions, CONVENTIONS)
        if not self.layers:
            raise ValueError(f"layers=(): name at least one of {', '.join(ATTENTION_KINDS)}")
        for kind in self.layers:
            one_of("layers", kind, ATTENTION_KINDS)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model}: not divisible by n_heads={self.n_heads}; "
                f"use d_model={-(-self.d_model // self.n_heads) * self.n_heads} or set d_head"
            )
        for name in ("dropout", "attention_dropout", "local_attention_dropout", "hash_dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share; give 0 ≤ {name} < 1")
        if self.norm_eps <= 0:
            raise ValueError(f"norm_eps={self.norm_eps}: keeps a division finite; give more than 0")
        if self.embedding_std <= 0:
            raise ValueError(f"embedding_std={self.embedding_std}: a standard deviation; give more than 0")
        if self.tie_weights and self.merge == "concat":
            raise ValueError(
                "tie_weights=True: the head sees 2·d_model values with merge='concat'; use merge='mean'"
            )
        if "oracle" in self.layers and self.max_length > LONGEST_ORACLE:
            raise ValueError(
                f"max_length={self.max_length}: 'oracle' layers hold every pair of at most {LONGEST_ORACLE} "
                "tokens; use a smaller max_length or 'lsh'"
            )
        if self.positions == "rotary" and self.head_width % 2:
            raise ValueError(
                f"d_head={self.head_width}: positions='rotary' turns pairs of coordinates; "
                f"use d_head={self.head_width + 1}"
            )
        self._check_axial()
        check_hashing(
            self.hashing, options=self.lsh_options(), n_buckets=self.bucket_count, dim=self.head_width
        )

    @property
    def head_width(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def feed_forward_width(self) -> int:
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

    @property
    def local_dropout(self) -> float:
        """Share of attention weights that `local` layers drop."""
        return (
            self.attention_dropout if self.local_attention_dropout is None else self.local_attention_dropout
        )

    @property
    def length_multiple(self) -> int:
        """What transformers pads a sequence to a multiple of: all chunk lengths in use."""
        return lcm(*self._chunk_lengths)

    @property
    def shortest_chunk(self) -> int:
        """Up to this length transformers pads nothing."""
        return min(self._chunk_lengths)

    def padded_length(self, seq: int) -> int:
        """Tokens that a sequence has once it is padded as the conventions ask."""
        if self.conventions == "own" or seq <= self.shortest_chunk:
            return seq
        return seq + -seq % self.length_multiple

    @property
    def longest_input(self) -> int:
        """The longest sequence that padding leaves within `max_length`."""
        if self.conventions == "own":
            return self.max_length
        whole = self.max_length // self.length_multiple * self.length_multiple
        return max(whole, min(self.shortest_chunk, self.max_length))

    @property
    def _chunk_lengths(self) -> list[int]:
        lengths = {"lsh": self.chunk_length, "local": self.local_chunk_length or self.chunk_length}
        return [lengths.get(self.kind(layer), 1) for layer in range(self.n_layers)]

    @property
    def joined_width(self) -> int:
        """Width of the two streams once they are merged."""
        return 2 * self.d_model if self.merge == "concat" else self.d_model

    @property
    def bucket_count(self) -> Buckets:
        """The explicit bucket count, or the automatic one for `max_length`."""
        if self.n_buckets is not None:
            return self.n_buckets
        return buckets.automatic(max_length=self.max_length, chunk_length=self.chunk_length)

    @property
    def axial_grid(self) -> tuple[int, int]:
        """Shape of the position grid: explicit, or the most square one that covers `max_length`."""
        if self.axial_shape is not None:
            return self.axial_shape
        first = max(1, int(self.max_length**0.5))
        return (first, -(-self.max_length // first))

    @property
    def axial_split(self) -> tuple[int, int]:
        """How d_model is divided over the two axes of the position grid."""
        if self.axial_dims is not None:
            return self.axial_dims
        return (self.d_model // 2, self.d_model - self.d_model // 2)

    def kind(self, layer: int) -> str:
        """Attention kind of a layer: the pattern, repeated."""
        return self.layers[layer % len(self.layers)]

    def lsh_options(self, *, n_hashes: int | None = None, dropout_p: float = 0.0) -> LSHOptions:
        """The switches of the `lsh` layers."""
        return LSHOptions(
            n_hashes=n_hashes if n_hashes is not None else self.n_hashes,
            chunk_length=self.chunk_length,
            n_chunks_before=self.n_chunks_before,
            n_chunks_after=self.n_chunks_after,
            causal=self.causal,
            causality=self.causality,
            duplicates=self.duplicates,
            seams=self.seams,
            logit_scale=self.logit_scale,
            bucket_mask=self.bucket_mask,
            dropout_p=dropout_p,
            backend=self.backend,
        )

    def backend_on(self, device: torch.device, *, dtype: torch.dtype = torch.float32) -> str:
        """What computes the attention of the layers there in that type, as in `flash` or `reference+sdpa`.

        A kind that is computed in one way only, as `local` is, has no word in it.

        Raises:
            ValueError: the backend that is asked for cannot compute these settings there.
        """
        words = []
        for kind in dict.fromkeys(self.kind(layer) for layer in range(self.n_layers)):
            if kind == "lsh":
                options = self.lsh_options(dropout_p=self.attention_dropout)
                words.append(options.backend_on(device, dtype=dtype, width=self.head_width))
            elif kind == "full_standard":
                words.append("sdpa")
        return "+".join(words)

    def _check_axial(self) -> None:
        if self.positions != "axial":
            return
        shape, dims = self.axial_grid, self.axial_split
        if len(shape) != 2 or min(shape) < 1 or shape[0] * shape[1] < self.max_length:
            raise ValueError(
                f"axial_shape={shape}: two factors whose product is at least max_length={self.max_length}; "
                "use None for an automatic shape"
            )
        if len(dims) != 2 or sum(dims) != self.d_model or min(dims) < 1:
            raise ValueError(
                f"axial_dims={dims}: two widths that add up to d_model={self.d_model}; use None for halves"
            )
