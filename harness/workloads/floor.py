"""The floor of a layer or a model: the time that its matrix products alone would take on this machine.

Hashing, sorting, softmax and every move of data are left out. So are, in strict mode, the keys of a window
that a query does not see: counted are the pairs of buckets that are equally full, the fewest there can be. So
nothing reaches it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from harness.devices import DTYPES
from harness.record import Sample
from reformer import ReformerConfig
from reformer.attention.modules import SHARED_KINDS
from reformer.hashing.buckets import total

if TYPE_CHECKING:
    from harness.spec import TrialSpec

#: Products of a chunk with its window, all at once: enough to pay for the call, and in cache.
_PRODUCTS = 64
#: Side of the square product that a GPU is timed on: small ones would measure its launches.
_GPU_SIDE = 8192
_UNTIMED, _TIMED = 3, 30


def floor_samples(config: ReformerConfig, *, batch: int, seq: int) -> tuple[Sample, ...]:
    """`floor_flops` of the first layer's matrix products, forward and backward."""
    forward, backward = product_flops(config, batch=batch, seq=seq)
    return tuple(
        Sample(metric="floor_flops", unit="flop", values=(float(flops),), phase=phase)
        for phase, flops in (("forward", forward), ("backward", backward))
    )


def model_floor_samples(config: ReformerConfig, *, batch: int, seq: int) -> tuple[Sample, ...]:
    """`floor_flops` of a training step of the whole model.

    Where the residual kind computes blocks again, so does its floor.
    """
    tokens = batch * seq
    gates = 2 if config.activation in ("swiglu", "geglu") else 1
    wide = (gates + 1) * 2 * tokens * config.d_model * config.feed_forward_width
    blocks = [product_flops(config, batch=batch, seq=seq, layer=layer) for layer in range(config.n_layers)]
    once = sum(forward for forward, _ in blocks) + config.n_layers * wide
    head = 2 * tokens * config.joined_width * config.vocab_size
    again = 0 if config.residual == "plain" else once
    backward = sum(backward for _, backward in blocks) + 2 * (config.n_layers * wide + head) + again
    return tuple(
        Sample(metric="floor_flops", unit="flop", values=(float(flops),), phase=phase)
        for phase, flops in (("forward", once + head), ("backward", backward))
    )


def rate_sample(*rates: tuple[float, ...]) -> Sample:
    """Rates of matrix products, taken one or several times, as a sample."""
    values = tuple(value for each in rates for value in each)
    return Sample(metric="gemm_flop_per_s", unit="flop/s", values=values)


def product_rates_of(spec: TrialSpec) -> tuple[float, ...]:
    """`product_rates` on the device and in the type of a trial."""
    return product_rates(spec.reformer_config(), device=torch.device(spec.device), dtype=DTYPES[spec.dtype])


def product_flops(config: ReformerConfig, *, batch: int, seq: int, layer: int = 0) -> tuple[int, int]:
    """FLOPs of forward and of backward: projections, scores, and weighted values of a layer's attention.

    Backward has two products for each of forward's, and makes the scores again.
    """
    shared = config.kind(layer) in SHARED_KINDS
    width = config.n_heads * config.head_width
    projections = (3 if shared else 4) * 2 * batch * seq * config.d_model * width
    scores = 2 * batch * _pairs(config, seq=seq, layer=layer) * width
    return projections + 2 * scores, 2 * projections + 5 * scores


def _pairs(config: ReformerConfig, *, seq: int, layer: int) -> int:
    """Pairs of query and key that a head has to multiply."""
    kind = config.kind(layer)
    if kind == "lsh" and config.lsh_options().strict:
        return config.n_hashes * _pairs_of_a_round(
            seq, buckets=total(config.bucket_count), band=config.lsh_options().band
        )
    if kind == "lsh":
        window = (config.n_chunks_before + 1 + config.lsh_options().after) * config.chunk_length
        return seq * config.n_hashes * min(seq, window)
    if kind == "local":
        window = (config.local_n_chunks_before + 1) * (config.local_chunk_length or config.chunk_length)
        return seq * min(seq, window)
    return seq * (seq + 1) // 2


def _pairs_of_a_round(seq: int, *, buckets: int, band: int) -> int:
    """Pairs within a bucket and no further apart there than the band, as few as there can be.

    A bucket of n tokens has Σ min(i, band) pairs, i from 0 to n − 1, which is convex in n: buckets of equal
    sizes have the fewest.
    """
    small, larger = divmod(seq, buckets)

    def pairs(n: int) -> int:
        inside = min(n, band + 1)
        return inside * (inside - 1) // 2 + max(0, n - band - 1) * band

    return (buckets - larger) * pairs(small) + larger * pairs(small + 1)


def product_rates(config: ReformerConfig, *, device: torch.device, dtype: torch.dtype) -> tuple[float, ...]:
    """FLOP/s of matrix products as this machine reaches them now, one value a repetition.

    On a CPU in products of a chunk of queries with the keys of its window, the shape that LSH attention
    is made of; on a GPU in a large square product, the rate that a fused kernel could come near to.
    """
    if device.type == "cuda":
        products, rows, inner, columns = 1, _GPU_SIDE, _GPU_SIDE, _GPU_SIDE
    else:
        columns = (config.n_chunks_before + 1 + config.lsh_options().after) * config.chunk_length
        products, rows, inner = _PRODUCTS, config.chunk_length, config.head_width
    a = torch.randn(products, rows, inner, device=device, dtype=dtype)
    b = torch.randn(products, inner, columns, device=device, dtype=dtype)
    out = torch.bmm(a, b)
    took = [_seconds(lambda: torch.bmm(a, b, out=out), device=device) for _ in range(_UNTIMED + _TIMED)]
    flops = 2 * products * rows * inner * columns
    return tuple(float(round(flops / value)) for value in took[_UNTIMED:])


def _seconds(function: Callable[[], object], *, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
