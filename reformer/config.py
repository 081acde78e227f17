"""Everything that defines a Reformer, as plain values."""

from dataclasses import dataclass

from reformer.attention.options import LSHOptions, at_least, one_of
from reformer.hashing import buckets
from reformer.hashing.buckets import Buckets
from reformer.hashing.cross_polytope import CrossPolytope
from reformer.hashing.family import HashFamily

ATTENTION_KINDS = ("lsh", "local", "full", "full_standard")
RESIDUALS = ("plain", "reversible")
POSITIONS = ("learned", "axial")
MERGES = ("concat", "mean")


@dataclass(frozen=True, kw_only=True)
class ReformerConfig:
    """A Reformer, from integers and words alone.

    Args:
        vocab_size: number of token ids.
        max_length: longest sequence, in tokens; also fixes the automatic bucket count.
        d_model: width of each residual stream.
        d_ff: width of the feed-forward layer; None is 4·d_model.
        n_heads: attention heads.
        d_head: width of a head; None is d_model / n_heads.
        n_layers: blocks of one attention and one feed-forward.
        layers: attention kinds (`lsh`, `local`, `full`, `full_standard`), repeated to `n_layers`.
        n_hashes, n_buckets, chunk_length, n_chunks_before, n_chunks_after, causality, duplicates, seams,
        logit_scale, hashing, backend: of `lsh` layers, see `reformer.lsh_attention`.
        local_chunk_length: tokens a chunk of `local` layers; None is `chunk_length`.
        local_n_chunks_before: earlier chunks that `local` layers see.
        residual: `plain` keeps every activation for backward, `reversible` recomputes them from the outputs.
        positions: `learned`, or `axial` (two factors, any length up to their product).
        axial_shape: the two factors of the position grid; None is near √max_length.
        axial_dims: how d_model is divided over them; None is in halves.
        dropout: of embeddings and of both branches.
        attention_dropout: of attention weights.
        ff_chunk_length: rows of the feed-forward layer at once; None is all.
        loss_chunk_length: rows of logits at once in the loss; None is all.
        tie_weights: the head uses the embedding's matrix.
        merge: how the two streams end: `concat` or `mean`.
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
    n_hashes: int = 4
    n_buckets: Buckets | None = None
    chunk_length: int = 64
    n_chunks_before: int = 1
    n_chunks_after: int | None = None
    causality: str = "strict"
    duplicates: str = "count"
    seams: str = "masked"
    logit_scale: str = "trax"
    hashing: HashFamily = CrossPolytope()
    backend: str = "auto"
    local_chunk_length: int | None = None
    local_n_chunks_before: int = 1
    residual: str = "reversible"
    positions: str = "learned"
    axial_shape: tuple[int, int] | None = None
    axial_dims: tuple[int, int] | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    ff_chunk_length: int | None = None
    loss_chunk_length: int | None = None
    tie_weights: bool = False
    merge: str = "concat"
    hash_seed: int = 0
    embedding_std: float = 0.16

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_length", "d_model", "n_heads", "n_layers"):
            at_least(name, getattr(self, name), 1)
        for name in ("d_ff", "d_head", "ff_chunk_length", "loss_chunk_length", "local_chunk_length"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        at_least("local_n_chunks_before", self.local_n_chunks_before, 0)
        one_of("residual", self.residual, RESIDUALS)
        one_of("positions", self.positions, POSITIONS)
        one_of("merge", self.merge, MERGES)
        if not self.layers:
            raise ValueError(f"layers=(): name at least one of {', '.join(ATTENTION_KINDS)}")
        for kind in self.layers:
            one_of("layers", kind, ATTENTION_KINDS)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model}: not divisible by n_heads={self.n_heads}; "
                f"use d_model={-(-self.d_model // self.n_heads) * self.n_heads} or set d_head"
            )
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share; give 0 ≤ {name} < 1")
        if self.embedding_std <= 0:
            raise ValueError(f"embedding_std={self.embedding_std}: a standard deviation; give more than 0")
        if self.tie_weights and self.merge == "concat":
            raise ValueError(
                "tie_weights=True: the head sees 2·d_model values with merge='concat'; use merge='mean'"
            )
        self._check_axial()
        self.lsh_options()
        self.hashing.check(self.bucket_count)

    @property
    def head_width(self) -> int:
        return self.d_head if self.d_head is not None else self.d_model // self.n_heads

    @property
    def feed_forward_width(self) -> int:
        return self.d_ff if self.d_ff is not None else 4 * self.d_model

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
        """The switches of the `lsh` layers, causal."""
        return LSHOptions(
            n_hashes=n_hashes if n_hashes is not None else self.n_hashes,
            chunk_length=self.chunk_length,
            n_chunks_before=self.n_chunks_before,
            n_chunks_after=self.n_chunks_after,
            causality=self.causality,
            duplicates=self.duplicates,
            seams=self.seams,
            logit_scale=self.logit_scale,
            dropout_p=dropout_p,
            backend=self.backend,
        )

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
