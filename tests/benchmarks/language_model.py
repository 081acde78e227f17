"""A training step of a byte language model: ours, full attention in the same model, and published Reformers.

    python -m tests.benchmarks.language_model --lengths 1024 4096 16384 --threads 2

Forward, backward and a fused AdamW over the same bytes. The models take turns, so that a slow moment of the
machine meets all of them; shown are medians and the ratio of each turn to ours. `full` is our model with
torch's attention and every activation kept, as a Transformer is trained. Needs the extra `peers`.
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
import torch.nn.functional as F
from torch import Tensor, nn

from harness.probes import CpuAllocator
from reformer import ReformerConfig, ReformerLM

VOCAB = 256
MIB = 2**20
#: Of tokens and targets, the loss.
Loss = Callable[[Tensor, Tensor], Tensor]


def ours(arguments: argparse.Namespace, *, length: int, **settings: object) -> tuple[nn.Module, Loss]:
    given: dict[str, object] = {
        "vocab_size": VOCAB,
        "max_length": length,
        "d_model": arguments.d_model,
        "n_heads": arguments.n_heads,
        "n_layers": arguments.n_layers,
        "n_hashes": arguments.n_hashes,
        "chunk_length": arguments.chunk_length,
        "positions": "axial",
        "ff_chunk_length": arguments.ff_chunk_length,
        "loss_chunk_length": arguments.ff_chunk_length,
        **settings,
    }
    model = ReformerLM(ReformerConfig(**given))  # type: ignore[arg-type]
    return model, model.loss


def full(arguments: argparse.Namespace, *, length: int) -> tuple[nn.Module, Loss]:
    whole = {"layers": ("full_standard",), "residual": "plain"}
    return ours(arguments, length=length, ff_chunk_length=None, loss_chunk_length=None, **whole)


def transformers_model(arguments: argparse.Namespace, *, length: int) -> tuple[nn.Module, Loss]:
    from transformers import ReformerConfig as PeerConfig
    from transformers import ReformerModelWithLMHead

    width, rows = arguments.d_model, 1 << (length.bit_length() - 1) // 2
    config = PeerConfig(
        vocab_size=VOCAB, hidden_size=width, num_attention_heads=arguments.n_heads,
        attention_head_size=width // arguments.n_heads, feed_forward_size=4 * width, is_decoder=True,
        attn_layers=["lsh"] * arguments.n_layers, lsh_attn_chunk_length=arguments.chunk_length,
        num_hashes=arguments.n_hashes, num_buckets=None, max_position_embeddings=length,
        axial_pos_shape=(rows, length // rows), axial_pos_embds_dim=(width // 2, width // 2),
        hidden_dropout_prob=0.0, lsh_attention_probs_dropout_prob=0.0, hidden_act="gelu",
    )  # fmt: skip
    model = ReformerModelWithLMHead(config)
    # Targets are the tokens that follow; it shifts its labels by itself, which costs nothing to speak of.
    return model, lambda tokens, targets: model(tokens, labels=tokens).loss


def lucidrains_model(arguments: argparse.Namespace, *, length: int) -> tuple[nn.Module, Loss]:
    from reformer_pytorch import ReformerLM as PeerLM

    model = PeerLM(
        num_tokens=VOCAB, dim=arguments.d_model, depth=arguments.n_layers, heads=arguments.n_heads,
        max_seq_len=length, bucket_size=arguments.chunk_length, n_hashes=arguments.n_hashes, causal=True,
        axial_position_emb=False, ff_mult=4,
    )  # fmt: skip

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())

    return model, loss


MODELS: Mapping[str, Callable[..., tuple[nn.Module, Loss]]] = {
    "ours": ours,
    "full (SDPA)": full,
    "transformers": transformers_model,
    "reformer-pytorch": lucidrains_model,
}


class Step:
    """A model, and a step of its training."""

    def __init__(self, name: str, arguments: argparse.Namespace, *, length: int) -> None:
        torch.manual_seed(0)
        self.model, self.loss = MODELS[name](arguments, length=length)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)

    def __call__(self, tokens: Tensor, targets: Tensor) -> None:
        self.loss(tokens, targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(arguments: argparse.Namespace, *, length: int) -> dict[str, tuple[list[float], float]]:
    """Seconds of each turn, and MiB at the peak beside parameters and states, of each model."""
    tokens, targets = torch.randint(VOCAB, (2, 1, length))
    steps = {
        name: Step(name, arguments, length=length)
        for name in arguments.models
        if name != "full (SDPA)" or length <= arguments.longest_full
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.turns + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step(tokens, targets)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    peaks = {}
    for name, step in steps.items():
        allocator = CpuAllocator(0)
        with allocator.phase("step"):
            step(tokens, targets)
        peaks[name] = allocator.samples()[0].values[0] / MIB
    return {name: (seconds[name], peaks[name]) for name in steps}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--n-heads", type=int, default=4)
    parser.add_argument("--n-layers", type=int, default=4)
    parser.add_argument("--n-hashes", type=int, default=4)
    parser.add_argument("--chunk-length", type=int, default=64)
    parser.add_argument("--ff-chunk-length", type=int, default=4096, help="rows of ours at a time")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--longest-full", type=int, default=16384, help="full attention up to this length")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")
    settings = {name: value for name, value in vars(arguments).items() if name not in ("models", "lengths")}
    print(f"torch {torch.__version__}, " + ", ".join(f"{name} {value}" for name, value in settings.items()))
    print("\n| tokens | model | step ms | times ours | peak MiB |\n|--:|:--|--:|--:|--:|")
    for length in arguments.lengths:
        found = measure(arguments, length=length)
        for name, (seconds, peak) in found.items():
            ratios = [a / b for a, b in zip(seconds, found["ours"][0], strict=True)]
            print(
                f"| {length} | {name} | {1e3 * statistics.median(seconds):.0f} | "
                f"{statistics.median(ratios):.2f} | {peak:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
