"""LSH attention by a C++ kernel, compiled on first use and kept in the user's cache.

`native.cpp` says how it works. It needs no headers of torch, so a plain compiler makes it in two seconds; it
shares torch's OpenMP threads. To torch it is two operators, `torch.ops.reformer.native_forward` and
`native_backward`, so that profilers see it and its floating-point operations are counted.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from reformer.kernels import flash
from reformer.kernels.union import Attended, Pattern, beside

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
#: Bucket numbers are counted; where there are far more numbers than tokens they are numbered anew first.
_SPARSE = 2**16
#: Slots times the reach of a query, in integers of 32 bits.
_LARGEST = 2**31


# Its operators.


def forward(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    *,
    buckets: Int[Tensor, "batch heads rounds seq"],
    real: Bool[Tensor, "batch seq"] | None,
    pattern: Pattern,
    seed: int,
) -> Attended:
    """Attend; `seed` is that of dropout. Float32 alone."""
    if _too_large(qk, pattern):
        return flash.forward(qk, v, buckets=buckets, real=real, pattern=pattern, seed=seed)
    counts, numbers = _flattened(pattern)
    return Attended(*torch.ops.reformer.native_forward(qk, v, buckets, real, counts, numbers, seed))


def backward(
    qk: Float[Tensor, "batch heads seq dim"],
    v: Float[Tensor, "batch heads seq value"],
    attended: Attended,
    *,
    dout: Float[Tensor, "batch heads seq value"],
    real: Bool[Tensor, "batch seq"] | None,
    pattern: Pattern,
    seed: int,
) -> tuple[Float[Tensor, "batch heads seq dim"], Float[Tensor, "batch heads seq value"]]:
    """Gradients by queries-and-keys, and by values."""
    if _too_large(qk, pattern):
        return flash.backward(qk, v, attended, dout=dout, real=real, pattern=pattern, seed=seed)
    counts, numbers = _flattened(pattern)
    dqk, dv = torch.ops.reformer.native_backward(qk, v, *attended, dout, real, counts, numbers, seed)
    return dqk, dv


def _too_large(qk: Tensor, pattern: Pattern) -> bool:
    seq = qk.shape[2]
    return (seq + 1) * (min(seq, pattern.before * pattern.chunk_length) + 2) >= _LARGEST


def nearest_signed_axis(coordinates: Float[Tensor, "*rows half"]) -> Int[Tensor, "*rows"]:
    """argmax over [p, −p] of each row; ties go to the lowest. Float32 alone; rows may lie in any order."""
    found: Tensor = torch.ops.reformer.nearest_signed_axis(coordinates)
    return found


def step(
    qk: Float[Tensor, "batch heads 1 dim"],
    v: Float[Tensor, "batch heads 1 value"],
    *,
    buckets: Int[Tensor, "batch heads n_hashes 1"],
    queues: Int[Tensor, "rows n_hashes buckets band"],
    store: Float[Tensor, "rows slots key_and_value"],
    used: int,
    scale: float,
    epsilon: float,
    once: bool,
    own_score: float,
) -> Float[Tensor, "batch heads 1 value"]:
    """Attention of one more token a row, which goes into its cache. Float32 alone, no gradient.

    Args:
        qk: shared queries and keys, unnormalised.
        v: values.
        buckets: of these tokens.
        queues: slots of the last tokens of each bucket, oldest first; 0 is no token. Written.
        store: key and value of each slot. Written.
        used: the slot that they get.
        scale: keys are q·rsqrt(mean(q²) + ε)·scale.
        epsilon: the ε.
        once: whether a slot counts once however many queues it stands in.
        own_score: of the token with itself.
    """
    numbers = [scale, epsilon, own_score]
    found: Tensor = torch.ops.reformer.native_step(qk, v, buckets, queues, store, used, numbers, once)
    return found


def _flattened(pattern: Pattern) -> tuple[list[int], list[float]]:
    counts = [pattern.chunk_length, pattern.before, pattern.after]
    switches = [int(pattern.strict), int(pattern.causal), int(pattern.count)]
    return counts + switches, [pattern.scale, pattern.epsilon, pattern.dropout_p]


def _forward(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor,
    real: Tensor | None,
    counts: Sequence[int],
    numbers: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    out, logsumexp = beside(v), qk.new_empty(qk.shape[:3])
    order = torch.empty(buckets.shape, dtype=torch.int32)
    qk, v, real = _rows(qk), _rows(v), None if real is None else real.contiguous()
    low, high = (int(x) for x in buckets.aminmax())
    if high - low > max(_SPARSE, 2 * buckets.shape[-1]):
        buckets = buckets.unique(return_inverse=True)[1]
        low, high = 0, int(buckets.max())
    buckets = buckets.to(torch.int32).contiguous()
    problem = _Problem.of(qk, v, real=real, order=order, counts=counts, numbers=numbers, seed=seed)
    problem.first_bucket, problem.n_buckets = low, high - low + 1
    problem.buckets, problem.logsumexp = buckets.data_ptr(), logsumexp.data_ptr()
    problem.out = _Strided.of(out)
    problem.run("forward")
    return out, logsumexp, order


def _backward(
    qk: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    order: Tensor,
    dout: Tensor,
    real: Tensor | None,
    counts: Sequence[int],
    numbers: Sequence[float],
    seed: int,
) -> tuple[Tensor, Tensor]:
    dqk, dv = beside(qk), beside(v)
    qk, v, dout = _rows(qk), _rows(v), _rows(dout)
    real = None if real is None else real.contiguous()
    problem = _Problem.of(qk, v, real=real, order=order, counts=counts, numbers=numbers, seed=seed)
    problem.logsumexp = logsumexp.data_ptr()
    problem.out, problem.dout = _Strided.of(out), _Strided.of(dout)
    problem.dqk, problem.dv = _Strided.of(dqk), _Strided.of(dv)
    problem.run("backward")
    return dqk, dv


def _rows(x: Tensor) -> Tensor:
    """What a token holds, contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _nearest_signed_axis(coordinates: Tensor) -> Tensor:
    *sizes, half = coordinates.shape
    found = torch.empty(sizes, dtype=torch.int64)
    rows = _rows(coordinates if len(sizes) <= 4 else coordinates.flatten(0, -5))
    rows = rows[(None,) * (5 - rows.dim())]
    _library().reformer_nearest_signed_axis(
        ctypes.c_void_p(rows.data_ptr()),
        (ctypes.c_int64 * 4)(*rows.shape[:4]),
        (ctypes.c_int64 * 4)(*rows.stride()[:4]),
        ctypes.c_int64(half),
        ctypes.c_int64(torch.get_num_threads()),
        ctypes.c_void_p(found.data_ptr()),
    )
    return found


def _step(
    qk: Tensor,
    v: Tensor,
    buckets: Tensor,
    queues: Tensor,
    store: Tensor,
    used: int,
    numbers: Sequence[float],
    once: bool,
) -> Tensor:
    rows, rounds, n_buckets, band = queues.shape
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    sizes = _StepSizes(
        *(rows, rounds, n_buckets, band, store.shape[1], qk.shape[-1], v.shape[-1], used, once),
        torch.get_num_threads(),
        *numbers,
    )
    arrays = qk.contiguous(), v.contiguous(), buckets.long().contiguous(), queues, store
    _library().reformer_step(
        *(ctypes.c_void_p(each.data_ptr()) for each in arrays),
        ctypes.byref(sizes),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


_OPERATORS = torch.library.Library("reformer", "DEF")
_SETTINGS = "Tensor? real, int[] counts, float[] numbers, int seed"
_OPERATORS.define(
    f"native_forward(Tensor qk, Tensor v, Tensor buckets, {_SETTINGS}) -> (Tensor, Tensor, Tensor)"
)
_OPERATORS.define(
    "native_backward(Tensor qk, Tensor v, Tensor out, Tensor logsumexp, Tensor order, Tensor dout, "
    f"{_SETTINGS}) -> (Tensor, Tensor)"
)
_OPERATORS.define("nearest_signed_axis(Tensor coordinates) -> Tensor")
_OPERATORS.define(
    "native_step(Tensor qk, Tensor v, Tensor buckets, Tensor(a!) queues, Tensor(b!) store, int used, "
    "float[] numbers, bool once) -> Tensor"
)
for _name, _function in (
    ("native_forward", _forward),
    ("native_backward", _backward),
    ("nearest_signed_axis", _nearest_signed_axis),
    ("native_step", _step),
):
    _OPERATORS.impl(_name, _function, "CPU")


@register_flop_formula(torch.ops.reformer.native_forward)
def _forward_flops(
    qk: Sequence[int], v: Sequence[int], buckets: Sequence[int], real: Any, counts: Any, *_: Any, **__: Any
) -> int:
    """Scores and weighted values of whole windows, though it leaves out what no query of a block sees."""
    return _products(buckets, counts, dim=qk[-1], value=v[-1], dims=1, values=1)


@register_flop_formula(torch.ops.reformer.native_backward)
def _backward_flops(
    qk: Sequence[int],
    v: Sequence[int],
    out: Any,
    logsumexp: Any,
    order: Sequence[int],
    dout: Any,
    real: Any,
    counts: Any,
    *_: Any,
    **__: Any,
) -> int:
    """Scores again, and the gradients by weights, values, keys, and queries."""
    return _products(order, counts, dim=qk[-1], value=v[-1], dims=3, values=2)


@register_flop_formula(torch.ops.reformer.native_step)
def _step_flops(
    qk: Any, v: Any, buckets: Any, queues: Sequence[int], store: Sequence[int], *_: Any, **__: Any
) -> int:
    """A score and a weighted value of everything in sight, though what is there twice is left out."""
    rows, rounds, _buckets, band = queues
    return 2 * rows * (rounds * band + 1) * store[-1]


def _products(
    order: Sequence[int], counts: Sequence[int], *, dim: int, value: int, dims: int, values: int
) -> int:
    """Of every pair of whole windows, with so many products of a query's and of a value's length."""
    batch, heads, rounds, seq = order
    chunk, before, after = counts[:3]
    slots = batch * heads * rounds * -(-seq // chunk) * chunk
    return 2 * slots * (before + 1 + after) * chunk * (dims * dim + values * value)


# What passes between Python and C++.


class _Strided(ctypes.Structure):
    """Vectors, and how many numbers apart batch rows, heads, and tokens lie."""

    _fields_ = [("at", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]

    @classmethod
    def of(cls, x: Float[Tensor, "batch heads seq dim"]) -> _Strided:
        return cls(x.data_ptr(), *x.stride()[:3])


class _StepSizes(ctypes.Structure):
    """`StepSizes` of native.cpp, in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "rounds", "buckets", "band", "slots")),
        *((name, ctypes.c_int64) for name in ("dim", "value", "used", "once", "threads")),
        *((name, ctypes.c_double) for name in ("scale", "epsilon", "own_score")),
    ]


class _Problem(ctypes.Structure):
    """`Problem` of native.cpp, in its order."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "rounds", "seq", "dim", "value")),
        *((name, ctypes.c_int64) for name in ("chunk_length", "before", "after")),
        *((name, ctypes.c_int64) for name in ("strict", "causal", "count", "threads")),
        *((name, ctypes.c_int64) for name in ("first_bucket", "n_buckets")),
        ("seed", ctypes.c_uint64),
        *((name, ctypes.c_double) for name in ("scale", "epsilon", "dropout")),
        *((name, _Strided) for name in ("qk", "v", "out", "dout", "dqk", "dv")),
        *((name, ctypes.c_void_p) for name in ("buckets", "real", "order", "logsumexp", "scratch")),
    ]

    @classmethod
    def of(
        cls,
        qk: Tensor,
        v: Tensor,
        *,
        real: Tensor | None,
        order: Tensor,
        counts: Sequence[int],
        numbers: Sequence[float],
        seed: int,
    ) -> _Problem:
        """The tensors must outlive it; `real` is contiguous."""
        problem = cls(*qk.shape[:2], order.shape[2], qk.shape[2], qk.shape[3], v.shape[3], *counts)
        problem.threads, problem.seed = torch.get_num_threads(), seed
        problem.scale, problem.epsilon, problem.dropout = numbers
        problem.qk, problem.v = _Strided.of(qk), _Strided.of(v)
        problem.order = order.data_ptr()
        problem.real = None if real is None else real.data_ptr()
        return problem

    def run(self, what: str) -> None:
        needed = _library().reformer_scratch(ctypes.byref(self), ctypes.c_int64(what == "backward"))
        scratch = torch.empty(needed, dtype=torch.float32)
        self.scratch = scratch.data_ptr()
        getattr(_library(), f"reformer_{what}")(ctypes.byref(self))


# Its library.


@functools.cache
def missing() -> str:
    """Why this machine has no such kernel; empty if it has. Compiles it if nobody has yet."""
    try:
        _library()
    except OSError as error:
        warnings.warn(f"attention and hashing on the CPU are several times slower: {error}", stacklevel=2)
        return str(error)
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    path = _cache() / f"native-{_version()}.so"
    if not path.exists():
        _compile(path)
    library = ctypes.CDLL(str(path))
    library.reformer_scratch.restype = ctypes.c_int64
    return library


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reformer"


def _version() -> str:
    """Of the source, the compiler and what this processor can do: a folder may serve several machines."""
    try:
        processor = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags"))
    except (OSError, StopIteration):
        processor = platform.processor()
    told = (SOURCE.read_bytes(), " ".join((*_compiler(), *FLAGS)).encode(), processor.encode())
    return hashlib.sha256(b"\0".join(told)).hexdigest()[:16]


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


def _compile(path: Path) -> None:
    """In a folder of its own first, so that nobody meets half of a library."""
    compiler = _compiler()
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no C++ compiler {compiler[0]!r}; install g++, or name one in CXX")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        done = subprocess.run(
            [*compiler, *FLAGS, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            first = next((x for x in done.stderr.splitlines() if "error" in x), "no message")
            raise OSError(f"{compiler[0]} could not compile {SOURCE.name}: {first}")
        made.replace(path)
