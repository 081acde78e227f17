"""An attention layer, forward and backward: ours, torch's full attention, published Reformers, and the floor.

    python -m tests.benchmarks.attention --lengths 1024 4096 16384 --n-hashes 4 --threads 2

Every layer has its projections. The implementations take turns, so that a slow moment of the machine meets
all of them; shown are medians. The floor is the time that the layer's matrix products alone would
take at the rate that this run measures for products of the size of a chunk. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

# Before torch is imported: its profiler would tell of every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor, nn

from harness.probes import CpuAllocator
from reformer import ReformerConfig
from reformer.attention.modules import AttentionCall, SharedQueryKeyAttention, StandardAttention

Layer = Callable[[Tensor], Tensor]
ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")
MIB = 2**20


def ours(arguments: argparse.Namespace, *, length: int, backend: str = "auto", **settings: str) -> Layer:
    config = _config(arguments, length=length, backend=backend, **settings)
    layer = SharedQueryKeyAttention(config, layer=0)
    return lambda x: layer(x, call=AttentionCall()).out


def full(arguments: argparse.Namespace, *, length: int) -> Layer:
    layer = StandardAttention(_config(arguments, length=length, layers=("full_standard",)), layer=0)
    return lambda x: layer(x, call=AttentionCall()).out


def _config(arguments: argparse.Namespace, *, length: int, **settings: object) -> ReformerConfig:
    given: dict[str, object] = {
        "vocab_size": 2,
        "max_length": length,
        "d_model": arguments.n_heads * arguments.head_width,
        "n_heads": arguments.n_heads,
        "n_layers": 1,
        "n_hashes": arguments.n_hashes,
        "chunk_length": arguments.chunk_length,
        "causal": True,
        **settings,
    }
    return ReformerConfig(**given)  # type: ignore[arg-type]


def transformers_layer(arguments: argparse.Namespace, *, length: int) -> Layer:
    from transformers import ReformerConfig as PeerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    width = arguments.n_heads * arguments.head_width
    config = PeerConfig(
        hidden_size=width, num_attention_heads=arguments.n_heads, attention_head_size=arguments.head_width,
        lsh_attn_chunk_length=arguments.chunk_length, num_hashes=arguments.n_hashes, num_buckets=None,
        is_decoder=True, max_position_embeddings=length, lsh_attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer, output = LSHSelfAttention(config), nn.Linear(width, width, bias=False)
    return lambda x: output(layer(x).hidden_states)


def lucidrains_layer(arguments: argparse.Namespace, *, length: int) -> Layer:
    from reformer_pytorch import LSHSelfAttention

    layer = LSHSelfAttention(
        dim=arguments.n_heads * arguments.head_width, heads=arguments.n_heads, n_hashes=arguments.n_hashes,
        bucket_size=arguments.chunk_length, causal=True,
    )  # fmt: skip
    return lambda x: layer(x)


LAYERS: Mapping[str, Callable[..., Layer]] = {
    "ours": ours,
    "ours, published + sum": lambda arguments, *, length: ours(
        arguments, length=length, causality="published", duplicates="sum"
    ),
    "ours, reference backend": lambda arguments, *, length: ours(
        arguments, length=length, backend="reference"
    ),
    "full (SDPA)": full,
    "transformers": transformers_layer,
    "reformer-pytorch": lucidrains_layer,
}


def seconds(layer: Layer, x: Tensor, *, backward: bool) -> float:
    start = time.perf_counter()
    out = layer(x)
    if backward:
        out.sum().backward()
    return time.perf_counter() - start


def peak_mib(layer: Layer, x: Tensor) -> float:
    """Of forward and backward, the parameters and the input left out."""
    allocator = CpuAllocator(0)
    with allocator.phase("forward"):
        out = layer(x)
    with allocator.phase("backward"):
        out.sum().backward()
    found = [sample.values[0] for sample in allocator.samples() if sample.metric == "peak_alloc_bytes"]
    return max(found) / MIB


def product_rate(chunk: int, width: int) -> float:
    """FLOP/s of products of a chunk with its window, many at once."""
    a, b = torch.randn(64, chunk, width), torch.randn(64, width, 2 * chunk)
    out = torch.bmm(a, b)
    best = min(_timed(lambda: torch.bmm(a, b, out=out)) for _ in range(50))
    return 2 * 64 * chunk * width * 2 * chunk / best


def _timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def floor_seconds(arguments: argparse.Namespace, *, length: int, rate: float) -> tuple[float, float]:
    """Forward, and forward with backward, of three projections, scores and weighted values."""
    width = arguments.n_heads * arguments.head_width
    projections = 3 * 2 * length * width * width
    attention = 2 * 2 * length * 2 * arguments.chunk_length * width * arguments.n_hashes
    # Backward has two products for each of forward's, and makes the scores again.
    return (projections + attention) / rate, (3 * projections + 3.5 * attention) / rate


def measure(arguments: argparse.Namespace, *, length: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of forward, of forward with backward, and MiB at the peak, of each implementation."""
    x = torch.randn(1, length, arguments.n_heads * arguments.head_width, requires_grad=True)
    torch.manual_seed(0)
    layers = {
        name: LAYERS[name](arguments, length=length)
        for name in arguments.layers
        if name != "full (SDPA)" or length <= arguments.longest_full
    }
    found: dict[str, tuple[float, float, float]] = {}
    times: dict[tuple[str, bool], list[float]] = {}
    for turn in range(arguments.turns + 1):
        for backward in (False, True):
            for name, layer in layers.items():
                took = seconds(layer, x, backward=backward)
                if turn:
                    times.setdefault((name, backward), []).append(took)
    for name, layer in layers.items():
        medians = (statistics.median(times[name, backward]) for backward in (False, True))
        found[name] = (*medians, peak_mib(layer, x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--n-hashes", type=int, default=4)
    parser.add_argument("--n-heads", type=int, default=8)
    parser.add_argument("--head-width", type=int, default=64)
    parser.add_argument("--chunk-length", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--longest-full", type=int, default=16384, help="full attention up to this length")
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS), metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    allocator = {name: os.environ[name] for name in ALLOCATOR_VARIABLES if name in os.environ}
    rate = product_rate(arguments.chunk_length, arguments.head_width)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, allocator {allocator or 'as it comes'}, "
        f"{arguments.n_hashes} rounds, {arguments.n_heads} heads of {arguments.head_width}, chunks of "
        f"{arguments.chunk_length}, {rate / 1e9:.0f} GFLOP/s\n"
    )
    print("| tokens | layer | forward ms | forward + backward ms | share of the floor | peak MiB |")
    print("|--:|:--|--:|--:|--:|--:|")
    for length in arguments.lengths:
        floors = floor_seconds(arguments, length=length, rate=rate)
        for name, (forward, both, peak) in measure(arguments, length=length).items():
            shares = "" if name == "full (SDPA)" else f"{floors[0] / forward:.0%}, {floors[1] / both:.0%}"
            print(
                f"| {length} | {name} | {1e3 * forward:.0f} | {1e3 * both:.0f} | {shares} | {peak:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
