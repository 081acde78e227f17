"""Reversible = plain: outputs, gradients, random stream; and what it keeps in memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reformer import CrossPolytope, HashFamily, ReformerLM
from reformer.hashing.buckets import Buckets
from tests.reformer.helpers import (
    BATCH,
    SEQ,
    assert_all_close,
    normal,
    small_model,
    small_tokens,
    with_residual,
)
from tests.reformer.memory import allocations, tensor_bytes

DROPOUT: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.3}
VARIANTS: dict[str, dict[str, Any]] = {
    "no dropout": {},
    "dropout": DROPOUT,
    "all kinds": {"layers": ("lsh", "local", "full", "full_standard"), "n_layers": 5} | DROPOUT,
    "chunked": {"ff_chunk_length": 5, "loss_chunk_length": 7} | DROPOUT,
    "published": {"causality": "published", "duplicates": "sum", "seams": "reference"} | DROPOUT,
    "axial, mean, tied": {"positions": "axial", "merge": "mean", "tie_weights": True} | DROPOUT,
    "one layer": {"n_layers": 1} | DROPOUT,
}
PADDING = normal(BATCH, SEQ, seed=5) > -0.7


def both(**settings: Any) -> tuple[ReformerLM, ReformerLM]:
    """A plain model and its reversible twin, on the same weights."""
    plain = small_model(residual="plain", **settings)
    return plain, with_residual(plain, "reversible")


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


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("padding_mask", [None, PADDING], ids=["whole", "padded"])
def test_reversible_gives_the_loss_the_gradients_and_the_random_stream_of_plain(
    variant: str, dtype: torch.dtype, tolerance: float, padding_mask: Tensor | None
) -> None:
    plain, reversible = both(dtype=dtype, **VARIANTS[variant])
    expected, stream = train(plain, padding_mask=padding_mask)
    actual, reversible_stream = train(reversible, padding_mask=padding_mask)
    assert torch.equal(actual, expected)
    assert_same_gradients(plain, reversible, tolerance=tolerance)
    assert torch.equal(reversible_stream, stream)


def test_dropout_is_really_on_in_these_comparisons() -> None:
    plain, _ = both(**DROPOUT)
    assert train(plain, seed=3)[0] != train(plain, seed=4)[0]


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("variant", ["dropout", "all kinds", "chunked"])
def test_under_autocast_reversible_stays_near_plain(backward_inside: bool, variant: str) -> None:
    plain, reversible = both(dtype=torch.float32, **VARIANTS[variant])
    losses = []
    for model in (plain, reversible):
        torch.manual_seed(3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(small_tokens(), small_tokens(seed=1))
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        losses.append(loss.detach())
    assert losses[0] == losses[1]
    assert_same_gradients(plain, reversible, tolerance=2e-2)
    a, b = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (plain, reversible)
    )
    assert a.numel() == sum(p.numel() for p in plain.parameters())
    assert F.cosine_similarity(a, b, dim=0) >= 0.999


def test_the_recompute_ignores_an_autocast_that_the_forward_pass_did_not_have() -> None:
    _, reversible = both(dtype=torch.float32)
    seen: list[torch.dtype] = []
    for module in reversible.blocks.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    loss = reversible.loss(small_tokens(), small_tokens(seed=1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    # Five projections a block, in the forward pass and in the recompute.
    assert seen == [torch.float32] * (2 * 3 * 5)


@pytest.mark.parametrize(
    "order", [(0, 1), (1, 0), (2,)], ids=["first in first out", "last in first out", "sum"]
)
def test_two_forward_passes_before_the_backward_ones_do_not_disturb_each_other(
    order: tuple[int, ...],
) -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        torch.manual_seed(3)
        losses = [model.loss(small_tokens(seed=s), small_tokens(seed=s + 1)) for s in (0, 7)]
        losses.append(losses[0] + 3 * losses[1])
        for index in order:
            losses[index].backward()
    assert_same_gradients(plain, reversible, tolerance=1e-11)


def test_gradients_accumulate_and_a_kept_graph_gives_them_again() -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        train(model, seed=3)
        train(model, seed=4)
        loss = model.loss(small_tokens(), small_tokens(seed=1))
        loss.backward(retain_graph=True)
        loss.backward()
    assert_same_gradients(plain, reversible, tolerance=1e-11)


def switch_to_eval(model: ReformerLM) -> None:
    model.eval()


def evaluate_between(model: ReformerLM) -> None:
    model.eval()
    model.score(small_tokens(seed=5), small_tokens(seed=6))
    model.train()
    torch.rand(17)


@pytest.mark.parametrize("between", [switch_to_eval, evaluate_between])
def test_what_happens_between_forward_and_backward_does_not_matter(
    between: Callable[[ReformerLM], None],
) -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        torch.manual_seed(3)
        loss = model.loss(small_tokens(), small_tokens(seed=1))
        between(model)
        mode = model.training
        loss.backward()
        assert {module.training for module in model.modules()} == {mode}
    assert_same_gradients(plain, reversible, tolerance=1e-11)


def test_dropout_left_on_in_an_evaluated_model_is_repeated_too() -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        train(model)
    assert_same_gradients(plain, reversible, tolerance=1e-11)


def test_backward_works_in_eval_mode() -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        train(model.eval())
    assert_same_gradients(plain, reversible, tolerance=1e-11)


@pytest.mark.parametrize("kind", ["full", "random", "knock_out"])
def test_the_settings_of_the_forward_pass_hold_in_backward(kind: str) -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        torch.manual_seed(3)
        with model.attending(kind=kind, n_hashes=3, hash_seed=5):
            loss = model.loss(small_tokens(), small_tokens(seed=1))
        loss.backward()
    assert_same_gradients(plain, reversible, tolerance=1e-11)


@pytest.mark.parametrize(
    "frozen",
    ["embedding", "positions", "attention", "feed_forward", "norm", "blocks.0", "blocks.2", "blocks", "head"],
)
def test_frozen_parameters_get_no_gradient_and_leave_the_others_right(frozen: str) -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen not in name)
        train(model)
    assert any(p.grad is None for p in plain.parameters())
    assert_same_gradients(plain, reversible, tolerance=1e-11)


def test_blocks_alone_learn_when_their_input_needs_no_gradient() -> None:
    plain, reversible = both()
    for model in (plain, reversible):
        model.requires_grad_(False)
        model.blocks.requires_grad_(True)
        train(model)
    assert all(p.grad is not None for p in reversible.blocks.parameters())
    assert_same_gradients(plain, reversible, tolerance=1e-11)


def test_autograd_grad_reaches_every_parameter_and_leaves_grad_alone() -> None:
    plain, reversible = both(**DROPOUT)
    found = []
    for model in (plain, reversible):
        torch.manual_seed(3)
        loss = model.loss(small_tokens(), small_tokens(seed=1))
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        assert all(p.grad is None for p in model.parameters())
    assert_all_close(found[1], found[0], tolerance=1e-11)


def test_gradient_hooks_of_parameters_fire_once() -> None:
    _, reversible = both()
    fired: list[str] = []
    for name, parameter in reversible.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    train(reversible)
    assert sorted(fired) == sorted(name for name, _ in reversible.named_parameters())


def test_a_second_derivative_is_an_error_and_not_a_wrong_number() -> None:
    _, reversible = both()
    loss = reversible.loss(small_tokens(), small_tokens(seed=1))
    (gradient,) = torch.autograd.grad(loss, [reversible.embedding.weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_weights_changed_before_backward_are_an_error_and_not_a_wrong_number() -> None:
    _, reversible = both()
    loss = reversible.loss(small_tokens(), small_tokens(seed=1))
    with torch.no_grad():
        reversible.get_parameter("blocks.1.feed_forward.wide.weight").mul_(2)
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


def test_each_layer_hashes_once_a_step_and_never_in_backward() -> None:
    hashing = Counting()
    _, reversible = both(hashing=hashing, **DROPOUT)
    loss = reversible.loss(small_tokens(), small_tokens(seed=1))
    assert len(hashing.calls) == 3
    loss.backward()
    assert len(hashing.calls) == 3


@pytest.mark.slow
def test_sixty_four_layers_in_float32_keep_their_gradients() -> None:
    plain, reversible = both(dtype=torch.float32, n_layers=64, **DROPOUT)
    train(plain)
    train(reversible)
    a, b = (
        torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None])
        for m in (plain, reversible)
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


def test_reversible_keeps_nothing_a_layer_but_its_buckets() -> None:
    buckets = tensor_bytes(BATCH, 2, 2, 509, dtype=torch.int32)
    activation = tensor_bytes(BATCH, 509, 62)
    a_layer = (kept_for_backward("reversible", 7) - kept_for_backward("reversible", 2)) / 5
    assert a_layer == pytest.approx(buckets, abs=512)
    assert a_layer < activation / 5
    plain = (kept_for_backward("plain", 7) - kept_for_backward("plain", 2)) / 5
    assert plain > 10 * activation


def test_the_training_peak_of_reversible_does_not_grow_with_depth() -> None:
    buckets = tensor_bytes(BATCH, 2, 2, 509, dtype=torch.int32)
    a_layer = (peak_without_gradients("reversible", 7) - peak_without_gradients("reversible", 2)) / 5
    assert a_layer < 2 * buckets
    assert (peak_without_gradients("plain", 7) - peak_without_gradients("plain", 2)) / 5 > 100 * buckets


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel_finds_every_gradient_of_reversible(one_process: None) -> None:
    plain, reversible = both(**DROPOUT)
    for model in (plain, reversible):
        parallel = nn.parallel.DistributedDataParallel(model)
        torch.manual_seed(3)
        parallel(small_tokens()).square().sum().backward()
    assert_same_gradients(plain, reversible, tolerance=1e-11)
