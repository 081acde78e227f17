"""Models that read both sides of a token: the masked language model and the classifier."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer import Hyperplane, ReformerClassifier, ReformerLM, ReformerMaskedLM
from reformer.config import ATTENTION_KINDS, RESIDUALS
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

CLASSES = 5
Model = ReformerMaskedLM | ReformerClassifier
MODELS = (ReformerMaskedLM, ReformerClassifier)
DROPOUT: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.3, "hash_dropout": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "dropout": DROPOUT,
    "all kinds": {"layers": ATTENTION_KINDS, "n_layers": 5} | DROPOUT,
    "own bucket": {"bucket_mask": True, "n_chunks_after": 2} | DROPOUT,
    "rotary, gated, mean": {
        "positions": "rotary",
        "d_head": 6,
        "norm": "rms_norm",
        "activation": "geglu",
        "merge": "mean",
        "ff_chunk_length": 5,
    }
    | DROPOUT,
}
PADDING = normal(BATCH, SEQ, seed=5) > -0.5
PADDING[0, :3] = False

every_model = pytest.mark.parametrize("build", MODELS)


def small(build: type[Model], *, dtype: torch.dtype = torch.float64, **settings: Any) -> Model:
    torch.manual_seed(0)
    return build(small_config(causal=False, n_classes=CLASSES, **settings)).to(dtype)


def targets_of(model: Model) -> Tensor:
    if isinstance(model, ReformerClassifier):
        return integers(CLASSES, BATCH, seed=1)
    targets = small_tokens(seed=1)
    return targets.masked_fill(normal(BATCH, SEQ, seed=7) > 0, -100)


# Shapes and losses.


@every_model
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_score_are_those_of_the_logits_and_all_parameters_follow(
    build: type[Model], variant: str
) -> None:
    model = small(build, **VARIANTS[variant])
    tokens, targets = small_tokens(), targets_of(model)
    model.loss(tokens, targets, padding_mask=PADDING).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.eval()
    logits = model(tokens, padding_mask=PADDING)
    assert logits.shape == ((BATCH, CLASSES) if build is ReformerClassifier else (BATCH, SEQ, 23))
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    assert_all_close([model.loss(tokens, targets, padding_mask=PADDING)], [expected], tolerance=1e-12)
    scores = model.score(tokens, targets, padding_mask=PADDING)
    asked = targets != -100
    assert scores.scored == asked.sum()
    assert scores.correct == (logits.argmax(dim=-1)[asked] == targets[asked]).sum()
    assert_all_close([scores.nll_nats / scores.scored], [expected], tolerance=1e-6)


@every_model
def test_without_targets_the_loss_is_zero(build: type[Model]) -> None:
    model = small(build)
    loss = model.loss(small_tokens(), torch.full_like(targets_of(model), -100))
    loss.backward()
    assert loss == 0


@every_model
def test_an_empty_batch_has_no_loss(build: type[Model]) -> None:
    model = small(build)
    tokens, targets = small_tokens()[:0], targets_of(model)[:0]
    assert model(tokens).shape[0] == 0
    assert model.loss(tokens, targets) == 0
    assert model.score(tokens, targets).scored == 0


# What may be seen.


@pytest.mark.parametrize("kind", ATTENTION_KINDS)
def test_a_masked_language_model_sees_both_sides(kind: str) -> None:
    # One bucket and one chunk, so that lsh and local see all there is.
    model = small(ReformerMaskedLM, layers=(kind,), n_layers=1, chunk_length=31).eval()
    tokens = small_tokens()
    logits = model(tokens)
    for place in (0, SEQ - 1):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 23
        moved = ((model(changed) - logits).abs().amax(dim=-1) > 1e-9).double().mean()
        assert moved > (0.5 if kind == "oracle" else 0.9)


@every_model
@pytest.mark.parametrize("kind", ATTENTION_KINDS)
@pytest.mark.parametrize("residual", ["plain", "reversible"])
def test_tokens_at_padding_move_nothing_real_and_padding_behind_is_as_if_absent(
    build: type[Model], kind: str, residual: str
) -> None:
    model = small(build, layers=(kind,), residual=residual).eval()
    tokens, other = small_tokens(), small_tokens(seed=9)
    real = PADDING if build is ReformerMaskedLM else torch.ones(BATCH, dtype=torch.bool)
    logits = model(tokens, padding_mask=PADDING)
    changed = model(torch.where(PADDING, tokens, other), padding_mask=PADDING)
    assert_all_close([changed[real]], [logits[real]], tolerance=1e-12)
    assert not torch.allclose(model(tokens)[real], logits[real])
    short = model(tokens[:, :19])
    behind = model(tokens, padding_mask=torch.arange(SEQ).expand(BATCH, SEQ) < 19)
    assert_all_close([behind if build is ReformerClassifier else behind[:, :19]], [short], tolerance=1e-12)


@pytest.mark.parametrize("kind", ["full", "full_standard", "oracle"])
def test_with_rotary_positions_padding_in_front_is_as_if_absent_too(kind: str) -> None:
    model = small(ReformerClassifier, layers=(kind,), positions="rotary", d_head=6).eval()
    tokens = small_tokens()
    padded = torch.cat([tokens[:, 19:], tokens[:, :19]], dim=1)
    real = (torch.arange(SEQ) >= SEQ - 19).expand(BATCH, SEQ)
    assert_all_close([model(padded, padding_mask=real)], [model(tokens[:, :19])], tolerance=1e-11)
    learned = small(ReformerClassifier, layers=(kind,), d_head=6).eval()
    assert not torch.allclose(learned(padded, padding_mask=real), learned(tokens[:, :19]))


def test_a_classifier_reads_the_first_real_token() -> None:
    model = small(ReformerClassifier, n_layers=1).eval()
    tokens, first = small_tokens(), PADDING.int().argmax(dim=1)
    assert first.tolist() == [3, int(first[1])]
    with model.attending(kind="knock_out"):
        logits = model(tokens, padding_mask=PADDING)
        # Without attention a class depends on the token alone that it is read off.
        for place in range(SEQ):
            changed = tokens.clone()
            changed[:, place] = (changed[:, place] + 1) % 23
            moved = (model(changed, padding_mask=PADDING) != logits).any(dim=-1)
            assert moved.tolist() == (first == place).tolist()


def test_a_row_of_padding_alone_leaves_the_others_as_they_are() -> None:
    model = small(ReformerClassifier).eval()
    real = PADDING.clone()
    real[1] = False
    logits = model(small_tokens(), padding_mask=real)
    assert_all_close([logits[0]], [model(small_tokens(), padding_mask=PADDING)[0]], tolerance=1e-12)
    assert logits.isfinite().all()


# As of other models: recomputing, the state, other ways to attend.


@every_model
@pytest.mark.parametrize("residual", ["checkpoint", "reversible", "reversible_exact"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_gives_the_loss_the_gradients_and_the_random_stream_of_keeping(
    build: type[Model], residual: str, variant: str
) -> None:
    def step(kind: str) -> tuple[Tensor, list[Tensor], Tensor]:
        model = small(build, residual=kind, **VARIANTS[variant])
        torch.manual_seed(3)
        loss = model.loss(small_tokens(), targets_of(model), padding_mask=PADDING)
        loss.backward()
        gradients = [p.grad / p.grad.abs().max() for p in model.parameters() if p.grad is not None]
        assert len(gradients) == len(list(model.parameters()))
        return loss.detach(), gradients, torch.get_rng_state()

    with nothing_recomputed():
        loss, gradients, stream = step(residual if residual == "reversible_exact" else "plain")
    same_loss, same_gradients, same_stream = step(residual)
    assert torch.equal(same_loss, loss)
    assert_all_close(same_gradients, gradients, tolerance=1e-11)
    assert torch.equal(same_stream, stream)


@every_model
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_streams_come_back_to_the_bit_where_sums_are_exact(
    build: type[Model], variant: str, dtype: torch.dtype
) -> None:
    model = small(build, residual="reversible_exact", dtype=dtype, **VARIANTS[variant])
    errors = model.reconstruction_errors(small_tokens(), padding_mask=PADDING)
    assert errors.shape == (model.config.n_layers,)
    assert (errors == 0).all()


@every_model
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_state_holds_each_parameter_once(build: type[Model], residual: str, tied: bool) -> None:
    model = small(build, residual=residual, tie_weights=tied, merge="mean")
    held = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    assert len(held) == len(list(model.parameters())) == len({value.data_ptr() for value in held})


def test_a_tied_masked_language_model_has_no_matrix_but_the_embedding_s() -> None:
    tied, untied = (small(ReformerMaskedLM, tie_weights=each, merge="mean") for each in (True, False))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert sizes[1] - sizes[0] == 23 * 14
    tied.eval()
    before = tied(small_tokens())
    with torch.no_grad():
        tied.embedding.weight.mul_(2)
    assert not torch.allclose(tied(small_tokens()), before)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_language_model_fit_the_masked_one(tied: bool) -> None:
    config = small_config(tie_weights=tied, merge="mean")
    causal, masked = ReformerLM(config), ReformerMaskedLM(replace(config, causal=False))
    masked.load_state_dict(causal.state_dict())
    assert not torch.allclose(masked.eval()(small_tokens()), causal.eval()(small_tokens()))


@every_model
@pytest.mark.parametrize(
    "settings",
    [{"n_hashes": 5}, {"hashing": Hyperplane()}, {"kind": "oracle"}, {"kind": "knock_out"}],
    ids=str,
)
def test_attending_changes_the_model_inside_and_only_inside(
    build: type[Model], settings: dict[str, Any]
) -> None:
    model, tokens = small(build, n_hashes=1).eval(), small_tokens()
    before = model(tokens)
    with model.attending(**settings):
        assert not torch.allclose(model(tokens), before)
    assert torch.equal(model(tokens), before)


# What they learn.


def test_a_classifier_learns_whether_a_token_is_there() -> None:
    torch.manual_seed(0)
    config = small_config(
        causal=False, n_classes=2, d_model=32, d_ff=32, d_head=16, n_layers=1, n_hashes=2, max_length=16
    )
    model = ReformerClassifier(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        tokens = integers(8, 64, 16, seed=seed)
        # Half of the rows have no 7.
        tokens[::2] = tokens[::2].clamp(max=6)
        return tokens, (tokens == 7).any(dim=1).long()

    for index in range(80):
        loss = model.loss(*batch(index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = model.eval().score(*batch(10_000))
    assert scores.correct >= 0.95 * scores.scored


# What is refused.


@pytest.mark.parametrize(
    ("build", "settings", "says"),
    [
        (ReformerLM, {"causal": False}, "causal=False: .* use causal=True or a ReformerMaskedLM"),
        (ReformerMaskedLM, {}, "causal=True: a masked language model reads both sides .*; use causal=False"),
        (
            ReformerClassifier,
            {"n_classes": 2},
            "causal=True: a classifier reads both sides .*; use causal=False",
        ),
        (ReformerClassifier, {"causal": False}, "n_classes=None: .* two classes at least; use n_classes=2"),
    ],
)
def test_a_config_that_does_not_fit_is_a_value_error_that_names_value_rule_and_mend(
    build: type[nn.Module], settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        build(small_config(**settings))


def test_no_class_is_read_off_an_empty_sequence() -> None:
    model = small(ReformerClassifier)
    with pytest.raises(ValueError, match="seq=0: a class is read off a token; give one at least"):
        model(small_tokens()[:, :0])
    with pytest.raises(ValueError, match="seq=32: longer than max_length=31"):
        model(small_tokens(32))
