"""Recomputing = keeping: outputs, gradients, random stream; and what it keeps in memory."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer import CrossPolytope, HashFamily, ReformerLM
from reformer.config import ATTENTION_KINDS, RESIDUALS
from reformer.hashing.buckets import Buckets
from tests.reformer.helpers import (
    BATCH,
    SEQ,
    assert_all_close,
    normal,
    nothing_recomputed,
    small_model,
    small_tokens,
    with_residual,
)
from tests.reformer.memory import allocations, tensor_bytes

RECOMPUTING = ("checkpoint", "reversible", "reversible_exact")
DROPOUT: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.3}
TRANSFORMERS: dict[str, Any] = {
    "conventions": "transformers",
    "causality": "published",
    "duplicates": "sum",
    "seams": "reference",
    "layers": ("local", "lsh"),
    "local_chunk_length": 5,
    "max_length": 45,  # what 29 tokens are padded to
}
VARIANTS: dict[str, dict[str, Any]] = {
    "no dropout": {},
    "dropout": DROPOUT,
    "all kinds": {"layers": ATTENTION_KINDS, "n_layers": 5} | DROPOUT,
    "dropout of local layers alone": {"layers": ("local", "lsh"), "local_attention_dropout": 0.4},
    "chunked": {"ff_chunk_length": 5, "loss_chunk_length": 7} | DROPOUT,
    "published": {"causality": "published", "duplicates": "sum", "seams": "reference"} | DROPOUT,
    "transformers": TRANSFORMERS,
    "transformers, dropout": TRANSFORMERS | {"hash_dropout": 0.3} | DROPOUT,
    "axial, mean, tied": {"positions": "axial", "merge": "mean", "tie_weights": True} | DROPOUT,
    "rotary, gated": {
        "positions": "rotary",
        "d_head": 6,
        "norm": "rms_norm",
        "activation": "swiglu",
        "hash_dropout": 0.3,
        "ff_chunk_length": 5,
    }
    | DROPOUT,
    "sinusoidal, relu": {"positions": "sinusoidal", "activation": "relu"} | DROPOUT,
    "one layer": {"n_layers": 1} | DROPOUT,
}
PADDING = normal(BATCH, SEQ, seed=5) > -0.7

every_recomputing_kind = pytest.mark.parametrize("residual", RECOMPUTING)


class KeepingLM(ReformerLM):
    """The arithmetic of `reversible_exact`, but every activation is kept: its reference."""

    def forward(self, *args: Any, **settings: Any) -> Tensor:
        with nothing_recomputed():
            return super().forward(*args, **settings)

    def loss(self, *args: Any, **settings: Any) -> Tensor:
        with nothing_recomputed():
            return super().loss(*args, **settings)


def both(residual: str, **settings: Any) -> tuple[ReformerLM, ReformerLM]:
    """A model that keeps every activation and one that recomputes them, on the same weights."""
    recomputing = small_model(residual=residual, **settings)
    if residual != "reversible_exact":
        return with_residual(recomputing, "plain"), recomputing
    keeping = KeepingLM(recomputing.config).to(recomputing.embedding.weight.dtype)
    keeping.load_state_dict(recomputing.state_dict())
    return keeping, recomputing


def gradients_of(model: ReformerLM) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_same_gradients(a: ReformerLM, b: ReformerLM, *, tolerance: float) -> None:
    first, second = gradients_of(a), gradients_of(b)
    assert {name for name, g in first.items() if g is None} == {
        name for name, g in second.items() if g is None
    }
    pairs = [(g, second[name]) for name, g in first.items() if g is not None]
    assert pairs
    for g, h in pairs:
        assert h is not None
        assert_all_close([h / g.abs().max()], [g / g.abs().max()], tolerance=tolerance)


def train(model: ReformerLM, *, seed: int = 3, **settings: Any) -> tuple[Tensor, Tensor]:
    """One forward and backward pass: the loss, and where it leaves the global random stream."""
    torch.manual_seed(seed)
    loss = model.loss(small_tokens(), small_tokens(seed=1), **settings)
    loss.backward()
    return loss.detach(), torch.get_rng_state()


@every_recomputing_kind
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("dtype", "tolerance", "padding_mask"),
    [(torch.float64, 1e-11, None), (torch.float32, 1e-5, PADDING)],
    ids=["float64, whole", "float32, padded"],
)
def test_recomputing_gives_the_loss_the_gradients_and_the_random_stream_of_keeping(
    residual: str, variant: str, dtype: torch.dtype, tolerance: float, padding_mask: Tensor | None
) -> None:
    keeping, recomputing = both(residual, dtype=dtype, **VARIANTS[variant])
    expected, stream = train(keeping, padding_mask=padding_mask)
    actual, recomputing_stream = train(recomputing, padding_mask=padding_mask)
    assert torch.equal(actual, expected)
    assert_same_gradients(keeping, recomputing, tolerance=tolerance)
    assert torch.equal(recomputing_stream, stream)


@pytest.mark.parametrize("variant", ["dropout", "dropout of local layers alone"])
def test_dropout_is_really_on_in_these_comparisons(variant: str) -> None:
    keeping, _ = both("reversible", **VARIANTS[variant])
    assert train(keeping, seed=3)[0] != train(keeping, seed=4)[0]


@every_recomputing_kind
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("variant", ["dropout", "all kinds", "chunked"])
def test_under_autocast_recomputing_stays_near_keeping(
    residual: str, backward_inside: bool, variant: str
) -> None:
    keeping, recomputing = both(residual, dtype=torch.float32, **VARIANTS[variant])
    losses = []
    for model in (keeping, recomputing):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(small_tokens(), small_tokens(seed=1))
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        losses.append(loss.detach())
    assert losses[0] == losses[1]
    assert_same_gradients(keeping, recomputing, tolerance=1e-5 if residual == "reversible_exact" else 2e-2)
    a, b = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (keeping, recomputing)
    )
    assert a.numel() == sum(p.numel() for p in keeping.parameters())
    assert F.cosine_similarity(a, b, dim=0) >= 0.999


@every_recomputing_kind
def test_the_recompute_ignores_an_autocast_that_the_forward_pass_did_not_have(residual: str) -> None:
    _, recomputing = both(residual, dtype=torch.float32)
    seen: list[torch.dtype] = []
    for module in recomputing.blocks.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    loss = recomputing.loss(small_tokens(), small_tokens(seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    # Five projections a block, in the forward pass and in the recompute.
    assert seen == [torch.float32] * (2 * 3 * 5)


@every_recomputing_kind
@pytest.mark.parametrize(
    "order", [(0, 1), (1, 0), (2,)], ids=["first in first out", "last in first out", "sum"]
)
def test_two_forward_passes_before_the_backward_ones_do_not_disturb_each_other(
    residual: str,
    order: tuple[int, ...],
) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    for model in (keeping, recomputing):
        torch.manual_seed(3)
        losses = [model.loss(small_tokens(seed=s), small_tokens(seed=s + 1)) for s in (0, 7)]
        losses.append(losses[0] + 3 * losses[1])
        for index in order:
            losses[index].backward()
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


@every_recomputing_kind
def test_gradients_accumulate_and_a_kept_graph_gives_them_again(residual: str) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    for model in (keeping, recomputing):
        train(model, seed=3)
        train(model, seed=4)
        loss = model.loss(small_tokens(), small_tokens(seed=1))
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


def switch_to_eval(model: ReformerLM) -> None:
    model.eval()


def evaluate_between(model: ReformerLM) -> None:
    model.eval()
    model.score(small_tokens(seed=5), small_tokens(seed=6))
    model.train()
    torch.rand(17)


def flip_every_block(model: ReformerLM) -> None:
    for block in model.blocks:
        block.train(not block.training)


@every_recomputing_kind
@pytest.mark.parametrize("between", [switch_to_eval, evaluate_between, flip_every_block])
@pytest.mark.parametrize("evaluated", [(), (1,), (0, 2)], ids=str)
def test_what_happens_between_forward_and_backward_does_not_matter(
    residual: str, evaluated: tuple[int, ...], between: Callable[[ReformerLM], None]
) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    for model in (keeping, recomputing):
        for index in evaluated:
            model.blocks[index].eval()
        torch.manual_seed(3)
        loss = model.loss(small_tokens(), small_tokens(seed=1))
        between(model)
        modes = [module.training for module in model.modules()]
        loss.backward()
        assert [module.training for module in model.modules()] == modes
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


@every_recomputing_kind
def test_dropout_left_on_in_an_evaluated_model_is_repeated_too(residual: str) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    for model in (keeping, recomputing):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        train(model)
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


@every_recomputing_kind
def test_backward_works_in_eval_mode(residual: str) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    for model in (keeping, recomputing):
        train(model.eval())
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


@every_recomputing_kind
@pytest.mark.parametrize("kind", ["full", "random", "knock_out"])
def test_the_settings_of_the_forward_pass_hold_in_backward(residual: str, kind: str) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    for model in (keeping, recomputing):
        torch.manual_seed(3)
        with model.attending(kind=kind, n_hashes=3, hash_seed=5):
            loss = model.loss(small_tokens(), small_tokens(seed=1))
        loss.backward()
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


@every_recomputing_kind
@pytest.mark.parametrize(
    "frozen",
    ["embedding", "positions", "attention", "feed_forward", "norm", "blocks.0", "blocks.2", "blocks", "head"],
)
def test_frozen_parameters_get_no_gradient_and_leave_the_others_right(residual: str, frozen: str) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    for model in (keeping, recomputing):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        train(model)
    assert any(p.grad is None for p in keeping.parameters())
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


@every_recomputing_kind
def test_blocks_alone_learn_when_their_input_needs_no_gradient(residual: str) -> None:
    keeping, recomputing = both(residual)
    for model in (keeping, recomputing):
        model.requires_grad_(False)
        model.blocks.requires_grad_(True)
        train(model)
    assert all(p.grad is not None for p in recomputing.blocks.parameters())
    assert_same_gradients(keeping, recomputing, tolerance=1e-11)


@every_recomputing_kind
def test_outputs_need_a_gradient_when_the_input_does_not(residual: str) -> None:
    model = small_model(residual=residual)
    model.embedding.requires_grad_(False)
    model.positions.requires_grad_(False)
    logits = model(small_tokens())
    assert logits.requires_grad
    logits.sum().backward()
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_pass_leaves_nothing_on_the_modules(residual: str) -> None:
    model = small_model(residual=residual, **DROPOUT)

    def state() -> list[dict[str, Any]]:
        """Every attribute of every module; copied one level deep, where modules keep tensors in dicts."""
        return [
            {
                name: dict(x) if isinstance(x, dict) else x
                for name, x in vars(module).items()
                if name != "_draw"
            }
            for module in model.modules()
        ]

    before = state()
    loss = model.loss(small_tokens(), small_tokens(seed=1))
    assert state() == before
    loss.backward()
    assert state() == before


@pytest.mark.parametrize("residual", RESIDUALS)
def test_evaluation_repeats_itself_and_honours_each_padding_mask(residual: str) -> None:
    model = small_model(residual=residual, **DROPOUT).eval()
    whole, padded = model(small_tokens()), model(small_tokens(), padding_mask=PADDING)
    assert not torch.allclose(padded[PADDING], whole[PADDING])
    assert torch.equal(model(small_tokens()), whole)
    assert torch.equal(model(small_tokens(), padding_mask=PADDING), padded)
    with torch.no_grad():
        assert torch.equal(model(small_tokens()), whole)


@every_recomputing_kind
def test_autograd_grad_reaches_every_parameter_and_leaves_grad_alone(residual: str) -> None:
    keeping, recomputing = both(residual, **DROPOUT)
    found = []
    for model in (keeping, recomputing):
        torch.manual_seed(3)
        loss = model.loss(small_tokens(), small_tokens(seed=1))
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(p.grad is None for p in model.parameters())
    assert_all_close(found[1], found[0], tolerance=1e-11)


@every_recomputing_kind
def test_gradient_hooks_of_parameters_fire_once(residual: str) -> None:
    _, recomputing = both(residual)
    fired: list[str] = []
    for name, parameter in recomputing.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    train(recomputing)
    assert sorted(fired) == sorted(name for name, _ in recomputing.named_parameters())


@every_recomputing_kind
def test_a_second_derivative_is_an_error_and_not_a_wrong_number(residual: str) -> None:
    _, recomputing = both(residual)
    loss = recomputing.loss(small_tokens(), small_tokens(seed=1))
    with pytest.raises(RuntimeError, match=r"once_differentiable|second derivatives"):
        torch.autograd.grad(loss, [recomputing.embedding.weight], create_graph=True)[0].sum().backward()


@every_recomputing_kind
def test_weights_changed_before_backward_are_an_error_and_not_a_wrong_number(residual: str) -> None:
    _, recomputing = both(residual)
    loss = recomputing.loss(small_tokens(), small_tokens(seed=1))
    with torch.no_grad():
        recomputing.get_parameter("blocks.1.feed_forward.wide.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@dataclass(frozen=True, kw_only=True)
class Counting(HashFamily):
    """The paper's family, and the shape of every call."""

    calls: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(
        self, vectors: Tensor, *, n_hashes: int, n_buckets: Buckets, generator: torch.Generator
    ) -> Tensor:
        self.calls.append(tuple(vectors.shape))
        return CrossPolytope()(vectors, n_hashes=n_hashes, n_buckets=n_buckets, generator=generator)

    def collision_probability(self, x: float, *, n_buckets: Buckets, dim: int) -> float | None:
        return None


@every_recomputing_kind
def test_each_layer_hashes_once_a_step_and_never_in_backward(residual: str) -> None:
    hashing = Counting()
    _, recomputing = both(residual, hashing=hashing, **DROPOUT)
    loss = recomputing.loss(small_tokens(), small_tokens(seed=1))
    assert len(hashing.calls) == 3
    loss.backward()
    assert len(hashing.calls) == 3


@every_recomputing_kind
@pytest.mark.slow
def test_sixty_four_layers_in_float32_keep_their_gradients(residual: str) -> None:
    keeping, recomputing = both(residual, dtype=torch.float32, n_layers=64, **DROPOUT)
    train(keeping)
    train(recomputing)
    a, b = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (keeping, recomputing)
    )
    assert (a - b).norm() <= 1e-4 * a.norm()


# Memory.


def measured_model(residual: str, n_layers: int, **settings: Any) -> ReformerLM:
    return small_model(
        dtype=torch.float32,
        residual=residual,
        n_layers=n_layers,
        max_length=509,
        d_model=62,
        d_ff=127,
        d_head=31,
        n_hashes=2,
        chunk_length=37,
        **settings,
    )


def step_of(model: ReformerLM) -> Callable[[], Tensor]:
    tokens, targets = small_tokens(509), small_tokens(509, seed=1)
    return lambda: model.loss(tokens, targets)


def kept_for_backward(residual: str, n_layers: int) -> int:
    return allocations(step_of(measured_model(residual, n_layers))).kept


def peak_without_gradients(residual: str, n_layers: int) -> int:
    model = measured_model(residual, n_layers)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    loss = step_of(model)
    return allocations(lambda: loss().backward()).peak - gradients


#: What a layer keeps: the buckets of its hashes, and as many streams.
STREAMS = {"checkpoint": 2, "reversible": 0, "reversible_exact": 0}


@pytest.mark.parametrize(("residual", "streams"), STREAMS.items())
def test_a_layer_keeps_its_buckets_and_no_activation_but_its_streams(residual: str, streams: int) -> None:
    buckets = tensor_bytes(BATCH, 3, 2, 509, dtype=torch.int32)
    stream = tensor_bytes(BATCH, 509, 62)
    a_layer = (kept_for_backward(residual, 7) - kept_for_backward(residual, 2)) / 5
    assert a_layer == pytest.approx(buckets + streams * stream, abs=512)


@pytest.mark.parametrize(("residual", "streams"), STREAMS.items())
def test_the_training_peak_grows_with_depth_by_what_a_layer_keeps(residual: str, streams: int) -> None:
    buckets = tensor_bytes(BATCH, 3, 2, 509, dtype=torch.int32)
    stream = tensor_bytes(BATCH, 509, 62)
    a_layer = (peak_without_gradients(residual, 7) - peak_without_gradients(residual, 2)) / 5
    assert a_layer < 2 * buckets + streams * stream


def test_keeping_everything_costs_far_more_a_layer() -> None:
    buckets = tensor_bytes(BATCH, 3, 2, 509, dtype=torch.int32)
    stream = tensor_bytes(BATCH, 509, 62)
    assert 5 * buckets < stream
    assert (kept_for_backward("plain", 7) - kept_for_backward("plain", 2)) / 5 > 10 * stream
    assert (peak_without_gradients("plain", 7) - peak_without_gradients("plain", 2)) / 5 > 100 * buckets
