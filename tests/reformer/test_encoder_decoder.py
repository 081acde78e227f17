"""Two sequences: a decoder that recomputes equals one that keeps, and gives the encoder its gradient."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reformer import Hyperplane, ReformerConfig, ReformerEncoderDecoder
from reformer.generation import RecomputeWarning
from reformer.layer import Block
from reformer.lifting import build_lifting
from reformer.reversible import reconstruction_errors
from reformer.streams import Streams
from tests.reformer.helpers import (
    BATCH,
    SEQ,
    assert_all_close,
    integers,
    normal,
    nothing_recomputed,
    small_config,
    small_tokens,
)
from tests.reformer.memory import allocations, tensor_bytes

SOURCE = 19
DROPOUT: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.3}
KINDS = ("lsh", "local", "full", "full_standard", "oracle")
VARIANTS: dict[str, dict[str, Any]] = {
    "no dropout": {},
    "dropout": DROPOUT,
    "all kinds": {"layers": KINDS, "n_layers": 5} | DROPOUT,
    "chunked": {"ff_chunk_length": 5, "loss_chunk_length": 7, "activation": "swiglu"} | DROPOUT,
    "rotary, mean, tied": {
        "positions": "rotary",
        "d_head": 6,
        "merge": "mean",
        "tie_weights": True,
        "norm": "rms_norm",
        "hash_dropout": 0.3,
    }
    | DROPOUT,
}
PADDING = normal(BATCH, SEQ, seed=5) > -0.7
SOURCE_PADDING = normal(BATCH, SOURCE, seed=6) > -0.7
MASKS = {"padding_mask": PADDING, "source_padding_mask": SOURCE_PADDING}


def build(*, dtype: torch.dtype = torch.float64, **settings: Any) -> ReformerEncoderDecoder:
    """A model whose encoder differs from its decoder wherever it may."""
    config = small_config(**settings)
    encoder = replace(config, causal=False, d_model=16, vocab_size=13, n_layers=2, max_length=SOURCE)
    return ReformerEncoderDecoder(config, encoder=encoder).to(dtype)


def sequences(source: int = SOURCE, seq: int = SEQ) -> tuple[Tensor, Tensor, Tensor]:
    return integers(13, BATCH, source, seed=3), small_tokens(seq), small_tokens(seq, seed=1)


def step(residual: str, *, masks: dict[str, Tensor], **settings: Any) -> tuple[Tensor, list[Tensor], Tensor]:
    """Loss and all gradients of one step, and where it leaves the global random stream."""
    torch.manual_seed(0)
    model = build(residual=residual, **settings)
    torch.manual_seed(3)
    loss = model.loss(*sequences(), **masks)
    loss.backward()
    gradients = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        gradients.append(parameter.grad / parameter.grad.abs().max())
    return loss.detach(), gradients, torch.get_rng_state()


@pytest.mark.parametrize("residual", ["checkpoint", "reversible", "reversible_exact"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masks", [{}, MASKS], ids=["whole", "padded"])
def test_recomputing_gives_the_loss_all_gradients_and_the_random_stream_of_keeping(
    residual: str, variant: str, masks: dict[str, Tensor]
) -> None:
    kept = residual if residual == "reversible_exact" else "plain"
    with nothing_recomputed():
        loss, gradients, stream = step(kept, masks=masks, **VARIANTS[variant])
    same_loss, same_gradients, same_stream = step(residual, masks=masks, **VARIANTS[variant])
    assert torch.equal(same_loss, loss)
    assert_all_close(same_gradients, gradients, tolerance=1e-11)
    assert torch.equal(same_stream, stream)


@pytest.mark.parametrize("residual", ["reversible", "reversible_exact"])
@pytest.mark.parametrize("masks", [{}, MASKS], ids=["whole", "padded"])
def test_streams_come_back_through_three_branches_and_to_the_bit_where_sums_are_exact(
    residual: str, masks: dict[str, Tensor]
) -> None:
    model = build(residual=residual, dtype=torch.float32, **VARIANTS["all kinds"])
    source, tokens, _ = sequences()
    real, source_real = masks.get("padding_mask"), masks.get("source_padding_mask")
    decoder = model.decoder
    with torch.no_grad():
        x = decoder.embedding(tokens)
        encoded = model.encoder(source, padding_mask=source_real)
    call = replace(decoder.attention_call(padding_mask=real), source=encoded, source_padding_mask=source_real)
    of_decoder = reconstruction_errors(
        [block for block in decoder.blocks if isinstance(block, Block)],
        x,
        call=call,
        lifting=build_lifting(residual, grid_bits=16),
    )
    of_encoder = model.encoder.reconstruction_errors(source, padding_mask=source_real)
    assert (of_decoder.shape, of_encoder.shape) == ((5,), (2,))
    for errors in (of_decoder, of_encoder):
        assert (errors == 0).all() if residual == "reversible_exact" else 0 < errors.max() < 1e-5


@pytest.mark.parametrize("residual", ["plain", "checkpoint", "reversible"])
def test_the_gradient_of_the_source_adds_up_over_the_layers(residual: str) -> None:
    model = build(residual=residual).eval()
    source, tokens, _ = sequences()
    encoded = model.encoder(source, padding_mask=None).detach().requires_grad_()

    def decode(encoded: Tensor) -> Tensor:
        streams: Streams = model.decoder(tokens, source=encoded, padding_mask=None, source_padding_mask=None)
        return streams.merged("concat")

    pull = normal(BATCH, SEQ, 28, seed=9)
    (gradient,) = torch.autograd.grad(decode(encoded), encoded, pull)
    direction = normal(*encoded.shape, seed=11)
    with torch.no_grad():
        far, near = (decode(encoded + step * direction) for step in (1e-5, -1e-5))
    slope = ((far - near) * pull).sum() / 2e-5
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-6)


def test_two_forward_passes_before_the_backward_ones_do_not_disturb_each_other() -> None:
    found = []
    for residual in ("plain", "reversible"):
        torch.manual_seed(0)
        model = build(residual=residual, **DROPOUT)
        source, tokens, targets = sequences()
        torch.manual_seed(3)
        first = model.loss(source, tokens, targets)
        second = model.loss(source.flip(0), targets, tokens)
        first.backward()
        second.backward()
        found.append([p.grad / p.grad.abs().max() for p in model.parameters() if p.grad is not None])
    assert_all_close(found[1], found[0], tolerance=1e-11)


def test_under_autocast_recomputing_stays_near_keeping() -> None:
    found = []
    for residual in ("plain", "reversible"):
        torch.manual_seed(0)
        model = build(residual=residual, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(*sequences(), **MASKS)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert F.cosine_similarity(found[0], found[1], dim=0) >= 0.999


# What may be seen.


def test_a_target_token_moves_no_logit_before_it_and_a_source_token_moves_all() -> None:
    model = build(layers=("lsh", "local", "full")).eval()
    source, tokens, other = sequences()
    logits = model(source, tokens)
    changed = model(source, torch.cat([tokens[:, :17], other[:, 17:]], dim=1))
    assert_all_close([changed[:, :17]], [logits[:, :17]], tolerance=1e-11)
    moved = (changed[:, 17:] - logits[:, 17:]).abs().amax(dim=-1) > 1e-6
    assert moved.double().mean() > 0.9
    first = source.clone()
    first[:, 0] = (first[:, 0] + 1) % 13
    last = source.clone()
    last[:, -1] = (last[:, -1] + 1) % 13
    for each in (first, last):
        assert ((model(each, tokens) - logits).abs().amax(dim=-1) > 1e-9).all()


@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_tokens_at_padding_move_no_real_logit(residual: str) -> None:
    model = build(residual=residual, layers=("lsh", "local", "full")).eval()
    source, tokens, other = sequences()
    logits = model(source, tokens, **MASKS)
    changed = model(
        torch.where(SOURCE_PADDING, source, (source + 5) % 13), torch.where(PADDING, tokens, other), **MASKS
    )
    assert_all_close([changed[PADDING]], [logits[PADDING]], tolerance=1e-12)
    assert not torch.allclose(model(source, tokens)[PADDING], logits[PADDING])


def test_padding_behind_is_as_if_it_were_absent() -> None:
    model = build(layers=("lsh", "local", "full")).eval()
    source, tokens, _ = sequences()
    short = model(source[:, :11], tokens[:, :17])
    padded = model(
        source,
        tokens,
        source_padding_mask=torch.arange(SOURCE).expand(BATCH, SOURCE) < 11,
        padding_mask=torch.arange(SEQ).expand(BATCH, SEQ) < 17,
    )
    assert_all_close([padded[:, :17]], [short], tolerance=1e-12)


# What is written.


@pytest.mark.parametrize("settings", [{}, {"positions": "rotary", "d_head": 6}], ids=["learned", "rotary"])
@pytest.mark.parametrize("layers", [("lsh", "local", "full"), ("oracle", "full_standard")], ids=str)
def test_greedy_targets_are_the_most_likely_tokens_of_the_parallel_pass(
    layers: tuple[str, ...], settings: dict[str, Any]
) -> None:
    model = build(layers=layers, **settings)
    source, tokens, _ = sequences(seq=3)
    written = model.generate(source, tokens, max_new_tokens=11, source_padding_mask=SOURCE_PADDING)
    whole = torch.cat([tokens, written], dim=1)
    logits = model.eval()(source, whole, source_padding_mask=SOURCE_PADDING)
    assert torch.equal(logits[:, 2:-1].argmax(dim=-1), written)


def test_each_row_is_written_as_if_alone_and_drawn_tokens_follow_the_seed() -> None:
    model = build()
    source, tokens, _ = sequences(seq=5)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    together = model.generate(
        source, tokens, max_new_tokens=7, padding_mask=real, source_padding_mask=SOURCE_PADDING
    )
    for row, length in enumerate((5, 2)):
        alone = model.generate(
            source[row : row + 1],
            tokens[row : row + 1, :length],
            max_new_tokens=7,
            source_padding_mask=SOURCE_PADDING[row : row + 1],
        )
        assert torch.equal(together[row : row + 1], alone)
    drawn = [model.generate(source, tokens, max_new_tokens=7, temperature=1.0, seed=s) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert model.training


def test_the_source_is_projected_once_a_target() -> None:
    model = build()
    calls: list[int] = []
    for block in model.decoder.blocks:
        assert isinstance(block, Block)
        block.cross_attention.key.register_forward_hook(lambda *_: calls.append(1))
    source, tokens, _ = sequences(seq=3)
    model.generate(source, tokens, max_new_tokens=7)
    assert len(calls) == len(model.decoder.blocks)


def test_a_decoder_that_no_cache_can_follow_reads_everything_again_and_says_so() -> None:
    model = build(causality="published")
    source, tokens, _ = sequences(seq=3)
    with pytest.warns(RecomputeWarning):
        written = model.generate(source, tokens, max_new_tokens=2)
    logits = model.eval()(source, torch.cat([tokens, written[:, :1]], dim=1))
    assert torch.equal(logits[:, -1].argmax(dim=-1), written[:, 1])


# What it is made of.


def test_by_default_the_encoder_is_the_decoder_s_config_but_not_causal() -> None:
    config = small_config(tie_weights=True, merge="mean")
    model = ReformerEncoderDecoder(config)
    assert model.encoder.config == replace(config, causal=False)
    assert model.decoder.config == config


@pytest.mark.parametrize("tie_weights", [True, False])
def test_each_parameter_is_once_in_the_state_which_another_model_takes(tie_weights: bool) -> None:
    model, other = (build(tie_weights=tie_weights, merge="mean").eval() for _ in range(2))
    state = model.state_dict()
    held = [value for value in state.values() if isinstance(value, Tensor)]
    assert len(held) == len(list(model.parameters())) == len({value.data_ptr() for value in held})
    source, tokens, _ = sequences()
    assert not torch.equal(other(source, tokens), model(source, tokens))
    other.load_state_dict(state)
    assert torch.equal(other(source, tokens), model(source, tokens))


def test_scores_and_loss_are_those_of_the_logits() -> None:
    model = build(loss_chunk_length=5).eval()
    source, tokens, targets = sequences()
    targets[0, :9] = -100
    logits = model(source, tokens, **MASKS)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_all_close([model.loss(source, tokens, targets, **MASKS)], [expected], tolerance=1e-12)
    scores = model.score(source, tokens, targets, **MASKS)
    assert scores.scored == 2 * SEQ - 9
    assert_all_close([scores.nll_nats / scores.scored], [expected], tolerance=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"n_hashes": 5}, {"hashing": Hyperplane()}, {"kind": "oracle"}, {"kind": "knock_out"}],
    ids=str,
)
def test_attending_changes_encoder_and_decoder_inside_and_only_inside(settings: dict[str, Any]) -> None:
    model = build(n_hashes=1).eval()
    source, tokens, _ = sequences()
    before, encoded = model(source, tokens), model.encoder(source, padding_mask=None)
    with model.attending(**settings):
        assert not torch.allclose(model.encoder(source, padding_mask=None), encoded)
        inside = model.decoder(tokens, source=encoded, padding_mask=None, source_padding_mask=None)
        assert not torch.allclose(model.decoder.head(inside), before)
    assert torch.equal(model(source, tokens), before)


@pytest.mark.parametrize(("batch", "source", "seq"), [(0, SOURCE, SEQ), (BATCH, 0, SEQ), (BATCH, SOURCE, 0)])
@pytest.mark.parametrize("residual", ["plain", "checkpoint", "reversible"])
def test_empty_sequences_are_fine(residual: str, batch: int, source: int, seq: int) -> None:
    model = build(residual=residual)
    tokens = integers(23, batch, seq)
    loss = model.loss(integers(13, batch, source), tokens, tokens)
    loss.backward()
    assert loss.isfinite()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_wrong_configs_and_lengths_are_value_errors_that_name_value_rule_and_mend() -> None:
    config = small_config()
    with pytest.raises(ValueError, match="causal=False: a decoder would see what it predicts; use causal="):
        ReformerEncoderDecoder(replace(config, causal=False))
    with pytest.raises(
        ValueError, match=r"encoder\.causal=True: an encoder reads both sides .*; use causal="
    ):
        ReformerEncoderDecoder(config, encoder=config)
    with pytest.raises(ValueError, match="seq=20: longer than max_length=19; build the model with"):
        build()(*sequences(source=20)[:2])


# What it learns, and what it keeps.


def test_it_learns_to_reverse_a_sequence() -> None:
    length, symbols = 5, 5
    torch.manual_seed(0)
    model = ReformerEncoderDecoder(
        ReformerConfig(
            vocab_size=symbols + 1,
            max_length=length,
            d_model=32,
            d_ff=32,
            n_heads=2,
            n_layers=1,
            n_hashes=1,
            n_buckets=2,
            chunk_length=5,
            residual="reversible",
        )
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        source = 1 + integers(symbols, 64, length, seed=seed)
        targets = source.flip(1)
        # Symbol 0 starts the target.
        return source, F.pad(targets[:, :-1], (1, 0)), targets

    for index in range(150):
        loss = model.loss(*batch(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    scores = model.score(*batch(10_000))
    assert scores.correct >= 0.99 * scores.scored


def measured(measure: Callable[[Callable[[], Tensor]], int], residual: str, n_layers: int) -> int:
    """What a training loss of so many decoder layers takes."""
    torch.manual_seed(0)
    config = small_config(
        max_length=509,
        d_model=62,
        d_ff=127,
        d_head=31,
        n_hashes=2,
        chunk_length=37,
        residual=residual,
        n_layers=n_layers,
    )
    model = ReformerEncoderDecoder(config, encoder=replace(config, causal=False, n_layers=1))
    source, tokens, targets = (small_tokens(509, seed=seed) for seed in (2, 0, 1))
    return measure(lambda: model.loss(source, tokens, targets))


def test_a_reversible_decoder_keeps_nothing_a_layer_but_its_buckets() -> None:
    def kept(loss: Callable[[], Tensor]) -> int:
        return allocations(loss).kept

    buckets = tensor_bytes(BATCH, 3, 2, 509, dtype=torch.int32)
    a_layer = (measured(kept, "reversible", 5) - measured(kept, "reversible", 2)) / 3
    assert a_layer == pytest.approx(buckets, abs=512)
    plain = (measured(kept, "plain", 5) - measured(kept, "plain", 2)) / 3
    assert plain > 100 * buckets


def test_the_training_peak_of_a_reversible_decoder_does_not_grow_with_depth() -> None:
    def peak(loss: Callable[[], Tensor]) -> int:
        return allocations(lambda: loss().backward()).peak

    buckets = tensor_bytes(BATCH, 3, 2, 509, dtype=torch.int32)
    # Self-attention has three matrices, cross-attention four of which two are twice as wide.
    gradients = tensor_bytes((3 + 6) * 62 * 93 + 2 * 62 * 127)
    a_layer = (measured(peak, "reversible", 5) - measured(peak, "reversible", 2)) / 3
    assert a_layer < 1.1 * gradients + 2 * buckets
    assert (measured(peak, "plain", 5) - measured(peak, "plain", 2)) / 3 > 10 * a_layer


def test_encoder_and_decoder_each_draw_once_a_training_forward_and_keep_count() -> None:
    model = build()

    def drawn(model: ReformerEncoderDecoder) -> list[int]:
        return [int(part.get_extra_state()["draw"]) for part in (model.encoder, model.decoder)]

    source, tokens, targets = sequences()
    model.loss(source, tokens, targets).backward()
    model.loss(source, tokens, targets)
    assert drawn(model) == [2, 2]
    model.eval()
    model.loss(source, tokens, targets)
    model.generate(source, tokens[:, :2], max_new_tokens=2)
    assert drawn(model) == [2, 2]
    other = build()
    other.load_state_dict(model.state_dict())
    assert drawn(other) == [2, 2]
