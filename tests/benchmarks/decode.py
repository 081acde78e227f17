"""Tokens a second of cached decoding: LSH and local attention against torch's full attention.

    python -m tests.benchmarks.decode --lengths 4096 32768 --threads 2

The models differ in their kind of attention alone and are decoded through the same code, in turns of a few
tokens each, so that a slow moment of the machine meets all of them. Each is first
checked to give the logits of its parallel pass.
"""

import argparse
import statistics
import time
from collections.abc import Mapping

import torch

from reformer import DecodeState, ReformerConfig, ReformerLM

KINDS = ("full_standard", "lsh", "local")


def build(kind: str, *, max_length: int, arguments: argparse.Namespace) -> ReformerLM:
    """A model of the sizes asked for; weights are random, since they move no cost."""
    torch.manual_seed(0)
    config = ReformerConfig(
        vocab_size=256,
        max_length=max_length,
        d_model=arguments.d_model,
        n_heads=arguments.n_heads,
        n_layers=arguments.n_layers,
        layers=(kind,),
        n_hashes=arguments.n_hashes,
        chunk_length=arguments.chunk_length,
        positions="axial",
    )
    return ReformerLM(config).eval()


def take_turns(states: Mapping[str, DecodeState], *, turns: int, tokens: int) -> dict[str, list[float]]:
    """Seconds a token of each state, a turn of some tokens each at a time; the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in states}
    for turn in range(turns + 1):
        for name, state in states.items():
            start = time.perf_counter()
            for _ in range(tokens):
                state.step(state.logits.argmax(dim=-1))
            if turn:
                seconds[name].append((time.perf_counter() - start) / tokens)
    return seconds


def check(kind: str, *, arguments: argparse.Namespace) -> None:
    """Refuse to measure what does not equal the parallel pass."""
    model = build(kind, max_length=300, arguments=arguments).double()
    tokens = torch.randint(256, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)
    state = model.start_decode(tokens[:, :200], max_new_tokens=100)
    for position in range(200, 300):
        state.step(tokens[:, position])
        assert torch.allclose(state.logits, expected[:, position], atol=1e-9), kind


def measure(length: int, *, arguments: argparse.Namespace) -> None:
    """Print a line a kind of attention, at one length of the prompt."""
    room = (arguments.turns + 1) * arguments.tokens
    tokens = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
    states, prefill_s = {}, {}
    for kind in arguments.kinds:
        model = build(kind, max_length=length + room, arguments=arguments)
        start = time.perf_counter()
        states[kind] = model.start_decode(tokens, max_new_tokens=room)
        prefill_s[kind] = time.perf_counter() - start
    seconds = take_turns(states, turns=arguments.turns, tokens=arguments.tokens)
    for kind in arguments.kinds:
        ratios = [a / b for a, b in zip(seconds["full_standard"], seconds[kind], strict=True)]
        print(
            f"{length:7d} {kind:14s} {1 / statistics.median(seconds[kind]):9.1f} tokens/s"
            f" {statistics.median(ratios):7.2f} × full_standard"
            f" {states[kind].cache_bytes / 2**20:9.1f} MiB of cache {prefill_s[kind]:8.2f} s of prefill",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--n-heads", type=int, default=8)
    parser.add_argument("--n-layers", type=int, default=2)
    parser.add_argument("--n-hashes", type=int, default=4)
    parser.add_argument("--chunk-length", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = vars(arguments) | {"torch": torch.__version__}
    print(" ".join(f"{name}={value}" for name, value in settings.items()))
    for kind in arguments.kinds:
        check(kind, arguments=arguments)
    for length in arguments.lengths:
        measure(length, arguments=arguments)


if __name__ == "__main__":
    main()
