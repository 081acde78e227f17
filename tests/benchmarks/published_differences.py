"""Where this Reformer differs from the published ones, measured on all of them.

    python tests/benchmarks/published_differences.py [ROW …]

Prints a Markdown table: a row a property, a column an implementation. Needs the extra `peers`.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# Before torch is imported: its profiler would tell of every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor, nn

from harness.probes import CpuAllocator
from reformer import ReformerConfig, ReformerLM, full_attention, lsh_attention
from reformer.attention.modules import merge_heads, split_heads
from reformer.layer import Block

VOCAB, LENGTH, CHUNK, BUCKETS, WIDTH, HEADS = 64, 256, 16, 32, 64, 4
ROUNDS = (1, 4)
MIB = 2**20

#: Text of the cells of a row, by column.
Row = Mapping[str, str]
COLUMNS = ("ours", "transformers", "reformer-pytorch")
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One implementation as a language model.

    Args:
        build: the model, by hash rounds, in eval mode, the same weights each time.
        logits: of tokens, always under the same hash rotations.
    """

    name: str
    build: Callable[[int], nn.Module]
    logits: Callable[[nn.Module, Tensor], Tensor]


def ours() -> Subject:
    def build(rounds: int) -> nn.Module:
        torch.manual_seed(0)
        return ReformerLM(_our_config(rounds)).eval()

    return Subject(name="ours", build=build, logits=lambda model, tokens: model(tokens))


def _our_config(rounds: int, *, ff_chunk_length: int | None = None) -> ReformerConfig:
    return ReformerConfig(
        vocab_size=VOCAB, max_length=LENGTH, d_model=WIDTH, n_heads=HEADS, n_layers=1, n_hashes=rounds,
        n_buckets=BUCKETS, chunk_length=CHUNK, ff_chunk_length=ff_chunk_length,
    )  # fmt: skip


def transformers_subject() -> Subject:
    def logits(model: nn.Module, tokens: Tensor) -> Tensor:
        out: Tensor = model(tokens, attention_mask=torch.ones_like(tokens)).logits
        return out

    return Subject(name="transformers", build=_transformers_model, logits=logits)


def _transformers_model(
    rounds: int,
    *,
    ff_chunk: int = 0,
    hash_seed: int | None = 0,
    chunk: int = CHUNK,
    n_buckets: int = BUCKETS,
    causal: bool = True,
) -> nn.Module:
    from transformers import ReformerConfig as PeerConfig
    from transformers import ReformerForMaskedLM, ReformerModelWithLMHead

    torch.manual_seed(0)
    config = PeerConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, num_attention_heads=HEADS, attention_head_size=WIDTH // HEADS,
        feed_forward_size=4 * WIDTH, attn_layers=["lsh"], axial_pos_shape=(16, 16),
        axial_pos_embds_dim=(WIDTH // 2, WIDTH // 2), lsh_attn_chunk_length=chunk, num_buckets=n_buckets,
        num_hashes=rounds, max_position_embeddings=LENGTH, is_decoder=causal, hash_seed=hash_seed,
        chunk_size_feed_forward=ff_chunk,
    )  # fmt: skip
    model: nn.Module = (ReformerModelWithLMHead if causal else ReformerForMaskedLM)(config).eval()
    return model


def lucidrains_subject() -> Subject:
    def logits(model: nn.Module, tokens: Tensor) -> Tensor:
        torch.manual_seed(0)  # it draws its rotations from the global stream
        out: Tensor = model(tokens)
        return out

    return Subject(name="reformer-pytorch", build=_lucidrains_model, logits=logits)


def _lucidrains_model(rounds: int, *, ff_chunks: int = 1) -> nn.Module:
    from reformer_pytorch import ReformerLM as PeerLM

    torch.manual_seed(0)
    model: nn.Module = PeerLM(
        num_tokens=VOCAB, dim=WIDTH, depth=1, max_seq_len=LENGTH, heads=HEADS, bucket_size=CHUNK,
        n_hashes=rounds, causal=True, ff_chunks=ff_chunks,
    ).eval()  # fmt: skip
    return model


def subjects() -> tuple[Subject, ...]:
    return (ours(), transformers_subject(), lucidrains_subject())


def some_tokens(rows: int = 4, *, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def leak() -> Row:
    """Share of earlier positions whose logits move when the last quarter of the input is changed."""
    before = some_tokens()
    after = before.clone()
    kept = LENGTH * 3 // 4
    after[:, kept:] = some_tokens(seed=2)[:, kept:]
    found = {}
    for subject in subjects():
        shares = []
        for rounds in ROUNDS:
            model = subject.build(rounds)
            moved = (subject.logits(model, after) - subject.logits(model, before))[:, :kept].abs().amax(-1)
            shares.append(float((moved > 1e-4).float().mean()))
        found[subject.name] = ", ".join(f"{share:.0%}" for share in shares)
    return found


@torch.no_grad()
def decode() -> Row:
    """Logits of cached decoding against those of one parallel pass: largest relative error, by batch row."""
    tokens, prompt = some_tokens(rows=2), LENGTH - 16
    found = {"reformer-pytorch": "no cache"}
    model = _shaken(ours().build(4))
    assert isinstance(model, ReformerLM)
    state = model.start_decode(tokens[:, :prompt], max_new_tokens=LENGTH - prompt)
    errors = []
    parallel = model(tokens)
    for position in range(prompt, LENGTH):
        step = state.step(tokens[:, position])
        errors.append((step - parallel[:, position]).abs().amax(-1))
    found["ours"] = _by_row(torch.stack(errors) / parallel.abs().max())
    peer = _shaken(_transformers_model(4))
    parallel = peer(tokens, attention_mask=torch.ones_like(tokens)).logits
    cached = peer(tokens[:, :prompt], use_cache=True)
    cache, errors = cached.past_buckets_states, []
    for position in range(prompt, LENGTH):
        out = peer(tokens[:, position : position + 1], past_buckets_states=cache, use_cache=True)
        cache = out.past_buckets_states
        errors.append((out.logits[:, 0] - parallel[:, position]).abs().amax(-1))
    found["transformers"] = _by_row(torch.stack(errors) / parallel.abs().max())
    return found


def _shaken(model: nn.Module) -> nn.Module:
    """Fresh weights hardly attend to anything; these do."""
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model


def _by_row(errors: Tensor) -> str:
    return ", ".join(f"{error:.2g}" for error in errors.amax(0).tolist())


@torch.no_grad()
def rounds() -> Row:
    """Relative difference to full attention with 1, 8 and 64 rounds, on the same vectors."""
    qk = torch.randn(2, HEADS, LENGTH, WIDTH // HEADS, generator=torch.Generator().manual_seed(0))
    found = {}
    for name, attend, logit_scale in (
        ("ours", _our_attention, "trax"),
        ("transformers", _transformers_attention, "trax"),
        ("reformer-pytorch", _lucidrains_attention, "sqrt_d"),
    ):
        exact = full_attention(qk, qk, logit_scale=logit_scale)
        errors = [float((attend(qk, n) - exact).norm() / exact.norm()) for n in (1, 8, 64)]
        found[name] = ", ".join(f"{error:.3f}" for error in errors)
    return found


def _our_attention(qk: Tensor, n_hashes: int) -> Tensor:
    return lsh_attention(qk, qk, n_hashes=n_hashes, n_buckets=8, chunk_length=64)


def _transformers_attention(qk: Tensor, n_hashes: int) -> Tensor:
    model = _transformers_model(n_hashes, chunk=64, n_buckets=8)
    attention = model.reformer.encoder.layers[0].attention.self_attention
    for projection in (attention.query_key, attention.value):
        nn.init.eye_(projection.weight)
    return split_heads(attention(merge_heads(qk)).hidden_states, heads=HEADS)


def _lucidrains_attention(qk: Tensor, n_hashes: int) -> Tensor:
    from reformer_pytorch import LSHAttention

    torch.manual_seed(0)
    attention = LSHAttention(bucket_size=32, n_hashes=n_hashes, causal=True).eval()
    out: Tensor = attention(qk.flatten(0, 1), qk.flatten(0, 1))[0]
    return out.unflatten(0, qk.shape[:2])


@torch.no_grad()
def seams() -> Row:
    """All tokens in one bucket, 4 rounds, bidirectional: relative error at the first chunk, and elsewhere."""
    # Every round orders such tokens alike, and what is right is attention within a window.
    width = WIDTH // HEADS
    common = torch.zeros(width)
    common[0] = 3000.0
    noise = torch.randn(2, HEADS, LENGTH, width, generator=torch.Generator().manual_seed(0))
    noise[..., 0] = 0
    qk = common + noise
    found = {}
    for name, scale, attended in (
        ("ours", 1.0, _our_seams(qk, noise)),
        ("transformers", 1.0, _transformers_seams(qk)),
        ("reformer-pytorch", width**-0.5, _lucidrains_seams(qk, noise)),
    ):
        exact = _windowed(qk, noise, scale=scale)
        first, others = (
            float((attended - exact)[:, :, part].norm() / exact[:, :, part].norm())
            for part in (slice(CHUNK), slice(CHUNK, None))
        )
        found[name] = f"{first:.2g}, {others:.2g}"
    return found


def _windowed(qk: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """Every token attends to its chunk and the one before, to itself only if it is alone."""
    chunk = torch.arange(LENGTH) // CHUNK
    back = chunk[:, None] - chunk[None]
    scores = qk @ nn.functional.normalize(qk, dim=-1).mT * scale
    scores = scores.masked_fill((back < 0) | (back > 1), -torch.inf)
    return scores.masked_fill(torch.eye(LENGTH, dtype=torch.bool), -1e5).softmax(-1) @ v


def _our_seams(qk: Tensor, v: Tensor) -> Tensor:
    return lsh_attention(qk, v, n_hashes=4, n_buckets=2, chunk_length=CHUNK, n_chunks_after=0, causal=False)


def _transformers_seams(qk: Tensor) -> Tensor:
    model = _transformers_model(4, n_buckets=2, causal=False)
    attention = model.reformer.encoder.layers[0].attention.self_attention
    for projection in (attention.query_key, attention.value):
        nn.init.eye_(projection.weight)
    # What all tokens have in common is no value.
    attention.value.weight[:: WIDTH // HEADS] = 0
    return split_heads(attention(merge_heads(qk)).hidden_states, heads=HEADS)


def _lucidrains_seams(qk: Tensor, v: Tensor) -> Tensor:
    from reformer_pytorch import LSHAttention

    torch.manual_seed(0)
    attention = LSHAttention(bucket_size=CHUNK, n_hashes=4, causal=False).eval()
    out: Tensor = attention(qk.flatten(0, 1), v.flatten(0, 1))[0]
    return out.unflatten(0, qk.shape[:2])


def feed_forward() -> Row:
    """MiB that a chunked feed-forward keeps for backward, unchunked → in 16 chunks."""
    found = {}
    builders: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
        "ours": (_our_feed_forward(None), _our_feed_forward(LENGTH // 16)),
        "transformers": (
            _transformers_model(1).reformer.encoder.layers[0].feed_forward.train(),
            _transformers_model(1, ff_chunk=LENGTH // 16).reformer.encoder.layers[0].feed_forward.train(),
        ),
        "reformer-pytorch": (_lucidrains_feed_forward(1), _lucidrains_feed_forward(16)),
    }
    for name, branches in builders.items():
        found[name] = " → ".join(f"{_saved(branch) / MIB:.2f}" for branch in branches)
    return found


def _our_feed_forward(rows: int | None) -> Callable[[Tensor], Tensor]:
    """The branch with its norm, as the others'."""
    block = ReformerLM(_our_config(1, ff_chunk_length=rows)).blocks[0]
    assert isinstance(block, Block)
    return block.feed


def _lucidrains_feed_forward(chunks: int) -> nn.Module:
    module: nn.Module = _lucidrains_model(1, ff_chunks=chunks).reformer.layers.blocks[0].g.net
    return module.train()


def _saved(branch: Callable[[Tensor], Tensor]) -> int:
    x = torch.randn(8, LENGTH, WIDTH, requires_grad=True)
    allocator = CpuAllocator(0)
    with allocator.phase("forward"):
        out = branch(x)
    kept = next(sample.values[0] for sample in allocator.samples() if sample.metric == "saved_bytes")
    return int(kept) - out.untyped_storage().nbytes()


def reproducible() -> Row:
    """Whether two trainings from one seed give the same loss after three steps."""
    found = {}
    for name, build in _trainable().items():
        losses = []
        for _ in range(2):
            model, loss_of = build()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.train()
            torch.manual_seed(7)
            for step in range(3):
                loss = loss_of(some_tokens(seed=step))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append(float(loss.detach()))
        found[name] = "yes" if losses[0] == losses[1] else f"no ({losses[0]:.4f}, {losses[1]:.4f})"
    return found


def stream() -> Row:
    """Whether an evaluation leaves the global random stream where it was."""
    found = {}
    for name, build in _trainable().items():
        model, loss_of = build()
        model.eval()
        before = torch.get_rng_state()
        with torch.no_grad():
            loss_of(some_tokens())
        found[name] = "yes" if torch.equal(before, torch.get_rng_state()) else "no"
    return found


Trainable = tuple[nn.Module, Callable[[Tensor], Tensor]]


def _trainable() -> dict[str, Callable[[], Trainable]]:
    def one_of_ours() -> Trainable:
        torch.manual_seed(0)
        model = ReformerLM(ReformerConfig(
            vocab_size=VOCAB, max_length=LENGTH, d_model=WIDTH, n_heads=HEADS, n_layers=1, n_buckets=32,
            chunk_length=CHUNK, dropout=0.1,
        ))  # fmt: skip
        return model, lambda tokens: model.loss(tokens, tokens)

    def one_of_transformers() -> Trainable:
        model = _transformers_model(4, hash_seed=None)
        return model, lambda tokens: _cross_entropy(
            model(tokens, attention_mask=torch.ones_like(tokens)).logits, tokens
        )

    def one_of_lucidrains() -> Trainable:
        model = _lucidrains_model(4)
        return model, lambda tokens: _cross_entropy(model(tokens), tokens)

    return {
        "ours": one_of_ours,
        "transformers": one_of_transformers,
        "reformer-pytorch": one_of_lucidrains,
    }


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


ROWS: dict[str, Callable[[], Row]] = {
    "leak": leak,
    "decode": decode,
    "rounds": rounds,
    "seams": seams,
    "feed_forward": feed_forward,
    "reproducible": reproducible,
    "stream": stream,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all by default")
    names = parser.parse_args().rows or list(ROWS)
    for name in names:
        if name not in ROWS:
            parser.error(f"no row {name!r}; there are {', '.join(ROWS)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f"| row | what is measured | {' | '.join(COLUMNS)} |")
    print(f"|:--|:--|{'--:|' * len(COLUMNS)}")
    for name in names:
        found = ROWS[name]()
        meaning = (ROWS[name].__doc__ or "").strip().removesuffix(".")
        cells = " | ".join(found.get(column, NOTHING) for column in COLUMNS)
        print(f"| `{name}` | {meaning} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
