"""The switches of LSH attention, checked once and shared by every implementation of it."""

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reformer.hashing import buckets as bucket_counts
from reformer.hashing.buckets import Buckets
from reformer.hashing.family import HashFamily, HashFunction
from reformer.kernels import native

#: Coordinates that are made at once to hash by.
_COORDINATES = 2**23

CAUSALITIES = ("strict", "bucket", "published")
DUPLICATES = ("count", "sum")
SEAMS = ("masked", "reference")
LOGIT_SCALES = ("trax", "sqrt_d")
#: On each kind of device the fastest first.
_FASTEST = {"cpu": ("native", "flash"), "cuda": ("triton", "flex")}
BACKENDS = ("auto", "reference", *(name for names in _FASTEST.values() for name in names))

_TRITON_IS_HERE = find_spec("triton") is not None
#: Triton reads it when it is imported.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
#: What the matrix units of a GPU multiply.
_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
#: The widest head that fits beside what a Triton program keeps.
_WIDEST = 256


@dataclass(frozen=True, kw_only=True)
class LSHOptions:
    """How LSH attention chooses and weighs its pairs.

    Args:
        n_hashes: hash rounds.
        chunk_length: tokens a chunk of the sorted sequence.
        n_chunks_before: earlier chunks that a query sees besides its own.
        n_chunks_after: later ones; None is 0 if causal, else 1.
        causal: a query sees no later position.
        causality: `strict` also keeps the choice of visible keys independent of the future; `bucket` and
            `published` do not (see `reformer.lsh_attention`). Ignored unless `causal`.
        duplicates: `count` weighs a pair once however many rounds see it, `sum` once a round.
        seams: `masked` keeps rounds apart; `reference` lets the first chunk of a round see the last of the
            previous one, as the published implementations do.
        logit_scale: `trax` uses q·k with k at unit length; `sqrt_d` divides once more by √dim.
        bucket_mask: a query sees its own bucket only; None is what `causality` implies.
        dropout_p: share of attention weights dropped.
        backend: how it is computed; `auto` is the fastest that can, see `backend_on`.
    """

    n_hashes: int
    chunk_length: int
    n_chunks_before: int = 1
    n_chunks_after: int | None = None
    causal: bool = True
    causality: str = "strict"
    duplicates: str = "count"
    seams: str = "masked"
    logit_scale: str = "trax"
    bucket_mask: bool | None = None
    dropout_p: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        at_least("n_hashes", self.n_hashes, 1)
        at_least("chunk_length", self.chunk_length, 1)
        at_least("n_chunks_before", self.n_chunks_before, 0)
        if self.n_chunks_after is not None:
            at_least("n_chunks_after", self.n_chunks_after, 0)
        one_of("causality", self.causality, CAUSALITIES)
        one_of("duplicates", self.duplicates, DUPLICATES)
        one_of("seams", self.seams, SEAMS)
        one_of("logit_scale", self.logit_scale, LOGIT_SCALES)
        one_of("backend", self.backend, BACKENDS)
        check_dropout(self.dropout_p)
        if self.strict and self.n_chunks_before < 1:
            raise ValueError(
                "n_chunks_before=0: causality 'strict' looks back one chunk at least; "
                "use n_chunks_before=1 or causality='bucket'"
            )
        if self.strict and self.n_chunks_after:
            raise ValueError(
                f"n_chunks_after={self.n_chunks_after}: causality 'strict' sees nothing later in the sorted "
                "order; use n_chunks_after=0 or causality='published'"
            )
        if self.bucket_mask is False and self.causal and self.causality != "published":
            raise ValueError(
                f"bucket_mask=False: causality '{self.causality}' shows a query its own bucket only; "
                "use bucket_mask=None or causality='published'"
            )

    @property
    def strict(self) -> bool:
        return self.causal and self.causality == "strict"

    @property
    def same_bucket(self) -> bool:
        """Whether a query sees its own bucket only."""
        if self.causal and self.causality in ("strict", "bucket"):
            return True
        return bool(self.bucket_mask)

    @property
    def wraps(self) -> bool:
        """Whether windows roll over all rounds. In strict mode that would never show anything."""
        return self.seams == "reference" and not self.strict

    @property
    def after(self) -> int:
        if self.n_chunks_after is not None:
            return self.n_chunks_after
        return 0 if self.causal else 1

    @property
    def band(self) -> int:
        """Entries of the sorted order before a query that it may see in strict mode."""
        return self.n_chunks_before * self.chunk_length

    def backend_on(self, device: torch.device, *, dtype: torch.dtype = torch.float32, width: int = 1) -> str:
        """The backend that computes this there, for heads of that type and width.

        Raises:
            ValueError: one is asked for by name that cannot.
        """
        if self.backend == "reference":
            return "reference"
        if self.backend == "auto":
            for backend in _FASTEST.get(device.type, ()):
                if not self._beyond(backend, device, dtype=dtype, width=width):
                    return backend
            return "reference"
        reason = self._beyond(self.backend, device, dtype=dtype, width=width)
        if reason:
            raise ValueError(f"backend='{self.backend}': {reason}; use backend='auto' or 'reference'")
        return self.backend

    def _beyond(self, backend: str, device: torch.device, *, dtype: torch.dtype, width: int) -> str:
        """Why that backend cannot compute this; empty if it can."""
        if backend == "triton":
            return self._beyond_triton(device, dtype=dtype, width=width)
        if backend == "flex":
            return self._beyond_flex(device, dtype=dtype)
        if backend == "native":
            return self._beyond_native(device, dtype=dtype)
        return self._beyond_flash(device)

    def _beyond_native(self, device: torch.device, *, dtype: torch.dtype) -> str:
        """Why the C++ kernel cannot compute this; empty if it can."""
        if device.type == "cpu" and dtype != torch.float32:
            return f"it computes in float32, not in {str(dtype).removeprefix('torch.')}"
        return self._beyond_flash(device) or native.missing()

    def _beyond_flash(self, device: torch.device) -> str:
        """Why the tiled path cannot compute this; empty if it can."""
        if device.type != "cpu":
            return f"it runs on the CPU, not on {device.type}"
        return self._beyond_union()

    def _beyond_triton(self, device: torch.device, *, dtype: torch.dtype, width: int) -> str:
        """Why the Triton kernels cannot compute this; empty if they can."""
        if not _TRITON_IS_HERE:
            return "the package triton is not installed"
        if device.type != "cuda" and not _INTERPRETED:
            return f"it runs on cuda, not on {device.type} (there only interpreted, with TRITON_INTERPRET=1)"
        if not _INTERPRETED and dtype not in _ON_GPU:
            return f"it computes in float32, bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
        if width > _WIDEST:
            return f"heads of {width} are wider than {_WIDEST}"
        return self._beyond_union()

    def _beyond_flex(self, device: torch.device, *, dtype: torch.dtype) -> str:
        """Why FlexAttention cannot compute this; empty if it can."""
        if device.type != "cuda":
            return f"it runs on cuda, not on {device.type}"
        if dtype not in _ON_GPU:
            return f"it computes in float32, bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
        if self.dropout_p:
            return "it drops no attention weights"
        return self._beyond_union()

    def _beyond_union(self) -> str:
        """Why this is no softmax over the rounds that one code a token tells; empty if it is."""
        if self.wraps:
            return "rounds that look into each other (seams='reference') are not among its patterns"
        if self.same_bucket and not self.strict:
            return (
                "chunk windows within a bucket (causality='bucket', bucket_mask) are not among its patterns"
            )
        return ""

    @property
    def n_keys(self) -> int:
        """Keys that the chunks before and after show a query in all rounds; strict, it sees no more."""
        return self.n_hashes * (self.n_chunks_before + self.after) * self.chunk_length


def hash_vectors(
    qk: Float[Tensor, "batch heads seq dim"],
    *,
    hashing: HashFamily,
    n_hashes: int,
    n_buckets: Buckets,
    generator: torch.Generator,
    padding_mask: Bool[Tensor, "batch seq"] | None = None,
) -> Int[Tensor, "batch heads n_hashes seq"]:
    """Bucket ids of unnormalised vectors: detached, in float32 (float64 if they are), autocast off.

    Some tokens at a time: the coordinates of all of them would be many times as large as the vectors. Ids
    of real tokens do not depend on what stands at padding; those of padding mean nothing.
    """
    batch, heads, seq, _ = qk.shape
    # A bucket is an axis of two signs, so that a factor takes half as many coordinates.
    per_token = batch * heads * n_hashes * sum(bucket_counts.factors(n_buckets)) // 2
    block = max(1, _COORDINATES // max(1, per_token))
    with torch.no_grad(), torch.autocast(qk.device.type, enabled=False):
        if padding_mask is not None and not hashing.token_wise:
            return _hash_real_tokens(
                qk,
                hashing=hashing,
                n_hashes=n_hashes,
                n_buckets=n_buckets,
                generator=generator,
                padding_mask=padding_mask,
            )
        if seq <= block or not hashing.token_wise:
            return hashing(_as_hashed(qk), n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)
        drawn = hash_function(
            qk, hashing=hashing, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator
        )
        ids = torch.empty(batch, heads, n_hashes, seq, dtype=torch.int32, device=qk.device)
        for start in range(0, seq, block):
            part = slice(start, min(start + block, seq))
            positions = torch.arange(part.start, part.stop, device=qk.device)[None]
            ids[..., part] = drawn(qk[:, :, part], positions)
        return ids


def _hash_real_tokens(
    qk: Float[Tensor, "batch heads seq dim"],
    *,
    hashing: HashFamily,
    n_hashes: int,
    n_buckets: Buckets,
    generator: torch.Generator,
    padding_mask: Bool[Tensor, "batch seq"],
) -> Int[Tensor, "batch heads n_hashes seq"]:
    """Each row as if it were alone and without padding, by the same draw; 0 at padding."""
    batch, heads, seq, _ = qk.shape
    check_padding_mask(padding_mask, expected=(batch, seq))
    start = generator.get_state()
    ids = torch.zeros(batch, heads, n_hashes, seq, dtype=torch.int64, device=qk.device)
    for row, real in enumerate(padding_mask):
        generator.set_state(start)
        vectors = _as_hashed(qk[row : row + 1, :, real])
        ids[row, ..., real] = hashing(
            vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator
        ).squeeze(0)
    return ids


def hash_function(
    qk: Float[Tensor, "batch heads any dim"],
    *,
    hashing: HashFamily,
    n_hashes: int,
    n_buckets: Buckets,
    generator: torch.Generator,
) -> HashFunction:
    """What `hash_vectors` hashes such vectors by, to hash tokens that come later in the same way."""
    drawn = hashing.draw(_as_hashed(qk), n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)

    def hash_tokens(
        qk: Float[Tensor, "batch heads seq dim"], positions: Int[Tensor, "#batch seq"]
    ) -> Int[Tensor, "batch heads n_hashes seq"]:
        with torch.autocast(qk.device.type, enabled=False):
            return drawn(_as_hashed(qk), positions)

    return hash_tokens


def _as_hashed(qk: Float[Tensor, "batch heads seq dim"]) -> Float[Tensor, "batch heads seq dim"]:
    vectors = qk.detach()
    return vectors if vectors.dtype == torch.float64 else vectors.float()


def resolve_buckets(
    qk: Float[Tensor, "batch heads seq dim"],
    *,
    options: LSHOptions,
    n_buckets: Buckets | None,
    max_length: int | None,
    hashing: HashFamily,
    generator: torch.Generator | None,
    buckets: Int[Tensor, "batch heads n_hashes seq"] | None,
    padding_mask: Bool[Tensor, "batch seq"] | None,
) -> Int[Tensor, "batch heads n_hashes seq"]:
    """The given bucket ids, or those of the hash family.

    Raises:
        ValueError: what `check_hashing` raises, or given ids of a wrong shape.
    """
    batch, heads, seq, dim = qk.shape
    if seq > bucket_counts.LARGEST_COUNT:
        raise ValueError(f"seq={seq}: more than {bucket_counts.LARGEST_COUNT} tokens; use shorter sequences")
    if buckets is not None:
        expected = (batch, heads, options.n_hashes, seq)
        if tuple(buckets.shape) != expected:
            raise ValueError(
                f"buckets of shape {tuple(buckets.shape)}: give [batch, heads, n_hashes, seq] = {expected}"
            )
        return buckets
    if max_length is not None:
        at_least("max_length", max_length, 1)
    if n_buckets is None:
        n_buckets = bucket_counts.automatic(max_length=max_length or seq, chunk_length=options.chunk_length)
    check_hashing(hashing, options=options, n_buckets=n_buckets, dim=dim)
    return hash_vectors(
        qk,
        hashing=hashing,
        n_hashes=options.n_hashes,
        n_buckets=n_buckets,
        generator=generator if generator is not None else torch.Generator().manual_seed(0),
        padding_mask=padding_mask,
    )


def check_hashing(hashing: HashFamily, *, options: LSHOptions, n_buckets: Buckets, dim: int) -> None:
    """Refuse a family that cannot make so many buckets of such vectors, or breaks what `causality` promises.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    hashing.check(n_buckets, dim=dim)
    if options.strict and not hashing.token_wise:
        raise ValueError(
            f"hashing={hashing}: a bucket depends on later tokens too, which causality 'strict' forbids; "
            "use a token-wise family (data_rotation=False) or causality='bucket'"
        )


def check_inputs(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    k: Float[Tensor, "batch heads seq dim"] | None = None,
    padding_mask: Bool[Tensor, "batch seq"] | None,
) -> None:
    """Refuse tensors that do not fit together.

    Raises:
        ValueError: names the shapes and what is expected.
    """
    if qk.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"qk of shape {tuple(qk.shape)}, v of {tuple(v.shape)}: give [batch, heads, seq, dim]"
        )
    if qk.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"qk of shape {tuple(qk.shape)}, v of {tuple(v.shape)}: batch, heads and seq differ; "
            f"give v of {(*qk.shape[:3], v.shape[3])}"
        )
    if k is not None and k.shape != qk.shape:
        raise ValueError(f"k of shape {tuple(k.shape)}: give the shape of q, {tuple(qk.shape)}")
    check_padding_mask(padding_mask, expected=(qk.shape[0], qk.shape[2]))


def check_padding_mask(padding_mask: Bool[Tensor, "batch seq"] | None, *, expected: tuple[int, int]) -> None:
    """Refuse a mask that does not say of each token whether it is real.

    Raises:
        ValueError: names the mask's shape and what is expected.
    """
    if padding_mask is None:
        return
    if padding_mask.dtype != torch.bool or tuple(padding_mask.shape) != expected:
        raise ValueError(
            f"padding_mask of shape {tuple(padding_mask.shape)} and {padding_mask.dtype}: "
            f"give bool [batch, seq] = {expected}, True at real tokens"
        )


def at_least(name: str, value: int, least: int) -> None:
    """Refuse an integer that is too small.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    if value < least:
        raise ValueError(f"{name}={value}: must be at least {least}; use {name}={least} or more")


def check_dropout(dropout_p: float) -> None:
    """Refuse a share of dropped weights that leaves none or is negative.

    Raises:
        ValueError: names the value, the rule and the mend.
    """
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}: a share of weights; give 0 ≤ dropout_p < 1")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a word that is not one of the choices.

    Raises:
        ValueError: names the value and the choices.
    """
    if value not in choices:
        raise ValueError(f"{name}={value!r}: use one of {', '.join(choices)}")
