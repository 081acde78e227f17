"""How exactly streams come back from the outputs of a stack."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from reformer import ReformerLM
from reformer.attention.modules import AttentionCall
from reformer.config import ATTENTION_KINDS, RESIDUALS
from reformer.layer import Block
from reformer.lifting import FloatLifting, IntegerLifting, Lifting
from reformer.reversible import reconstruction_errors
from reformer.stacks import run_plain, run_stack
from tests.reformer.helpers import (
    BATCH,
    SEQ,
    assert_all_close,
    normal,
    small_config,
    small_model,
    small_tokens,
)

DROPOUT: dict[str, Any] = {"dropout": 0.2, "attention_dropout": 0.3}
PADDING = normal(BATCH, SEQ, seed=5) > -0.7


def errors_at_depth_64(lifting: Lifting, *, dtype: torch.dtype, **settings: Any) -> Tensor:
    """Under autocast to a narrower type than float32, where one is given."""
    wide = dtype if dtype == torch.float64 else torch.float32
    config = small_config(layers=ATTENTION_KINDS, n_layers=64, **settings)
    blocks = [Block(config, layer=layer).to(wide) for layer in range(64)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return reconstruction_errors(
            blocks, normal(BATCH, SEQ, 14, dtype=wide), call=AttentionCall(draw=5), lifting=lifting
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "settings", [{}, DROPOUT | {"ff_chunk_length": 5}], ids=["whole", "chunked, dropout"]
)
def test_integer_lifting_is_undone_to_the_bit_through_sixty_four_layers(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    errors = errors_at_depth_64(IntegerLifting(bits=16), dtype=dtype, **settings)
    assert errors.shape == (64,)
    assert (errors == 0).all()


@pytest.mark.parametrize(
    "settings", [{}, DROPOUT | {"ff_chunk_length": 5}], ids=["whole", "chunked, dropout"]
)
@pytest.mark.parametrize(
    ("dtype", "first", "last"),
    [(torch.float64, 1e-11, 1e-14), (torch.float32, 1e-3, 1e-5), (torch.bfloat16, 1.0, 1e-5)],
    ids=str,
)
def test_lifting_in_floating_point_is_undone_up_to_rounding_that_adds_up(
    dtype: torch.dtype, first: float, last: float, settings: dict[str, Any]
) -> None:
    errors = errors_at_depth_64(FloatLifting(), dtype=dtype, **settings)
    assert errors.shape == (64,)
    assert 0 < errors[-1] < last
    assert errors[-1] < errors[0] < first


@pytest.mark.parametrize("residual", RESIDUALS)
def test_a_model_measures_itself_and_nothing_moves(residual: str) -> None:
    model = small_model(residual=residual, dtype=torch.float32, **DROPOUT)
    model(small_tokens())
    before, stream = model.state_dict(), torch.get_rng_state()
    errors = model.reconstruction_errors(small_tokens(), padding_mask=PADDING)
    cosine = model.gradient_cosine(small_tokens(), small_tokens(seed=1), padding_mask=PADDING)
    assert errors.shape == (3,)
    assert ((errors == 0) if residual == "reversible_exact" else (errors > 0)).all()
    assert cosine.item() == pytest.approx(1, abs=1e-9)
    assert torch.equal(torch.get_rng_state(), stream)
    assert model.get_extra_state() == before["_extra_state"]
    assert all(p.grad is None for p in model.parameters())


def test_the_cosine_shows_a_recompute_that_goes_wrong() -> None:
    model = small_model(residual="reversible", **DROPOUT)
    with mock.patch("reformer.replay.RandomState.replayed", nullcontext):
        assert model.gradient_cosine(small_tokens(), small_tokens(seed=1)) < 0.9


TRANSFORMERS: dict[str, Any] = {
    "conventions": "transformers",
    "causality": "published",
    "duplicates": "sum",
    "seams": "reference",
    "layers": ("local", "lsh"),
    "local_chunk_length": 5,
    "max_length": 45,  # what 29 tokens are padded to
}


@pytest.mark.parametrize("padding_mask", [None, PADDING], ids=["whole", "padded"])
def test_it_measures_the_pass_that_its_conventions_pad(padding_mask: Tensor | None) -> None:
    model = small_model(residual="reversible", dtype=torch.float32, attention_dropout=0.3, **TRANSFORMERS)
    tokens, targets = small_tokens(), small_tokens(seed=1)
    more = 45 - SEQ
    real = torch.ones(BATCH, SEQ, dtype=torch.bool) if padding_mask is None else padding_mask
    real = F.pad(real, (0, more))
    errors = model.reconstruction_errors(tokens, padding_mask=padding_mask)
    assert torch.equal(errors, model.reconstruction_errors(F.pad(tokens, (0, more)), padding_mask=real))
    # Only where the recompute is wrong does the cosine tell one pass from another.
    with mock.patch("reformer.replay.RandomState.replayed", nullcontext):
        torch.manual_seed(3)
        cosine = model.gradient_cosine(tokens, targets, padding_mask=padding_mask)
        torch.manual_seed(3)
        expected = model.gradient_cosine(
            F.pad(tokens, (0, more)), F.pad(targets, (0, more), value=-100), padding_mask=real
        )
    assert cosine < 0.99
    assert cosine.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_streams_of_the_exact_kind_are_those_of_plain_with_the_same_rounding(
    dtype: torch.dtype, autocast: bool
) -> None:
    config = small_config(layers=ATTENTION_KINDS, n_layers=8)
    blocks = [Block(config, layer=layer).to(dtype) for layer in range(8)]
    x, call = normal(BATCH, SEQ, 14, dtype=dtype), AttentionCall()
    lifting = IntegerLifting(bits=12)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        start = lifting.start(x)
        expected = run_plain(blocks, start, start, call=call, lifting=lifting)
        exact = run_stack(blocks, x, call=call, residual="reversible_exact", grid_bits=12)
        plain = run_stack(blocks, x, call=call, residual="plain", grid_bits=12)
        with torch.no_grad():
            evaluated = run_stack(blocks, x, call=call, residual="reversible_exact", grid_bits=12)
    assert_all_close(exact, expected, tolerance=0)
    assert_all_close(evaluated, expected, tolerance=0)
    for y, unrounded in zip(exact, plain, strict=True):
        assert y.dtype == dtype
        assert torch.equal(y * 2**12, (y * 2**12).round())
        assert not torch.equal(y, unrounded)


@pytest.mark.parametrize("gradients", [True, False])
def test_streams_too_large_for_the_grid_are_refused(gradients: bool) -> None:
    model = small_model(residual="reversible_exact", n_layers=1)
    with torch.no_grad():
        model.get_parameter("blocks.0.feed_forward.narrow.bias").fill_(200)
    with torch.set_grad_enabled(gradients), pytest.raises(OverflowError, match=r"a stream reached 201.*128"):
        model(small_tokens())
    relieved = ReformerLM(replace(model.config, grid_bits=15)).double()
    relieved.load_state_dict(model.state_dict())
    with torch.set_grad_enabled(gradients):
        relieved(small_tokens())


class CountingReads(TorchDispatchMode):
    """Counts where the program waits for a number of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_layers", [1, 7])
@pytest.mark.parametrize(("residual", "reads"), [("reversible", 0), ("reversible_exact", 1)])
def test_the_range_is_checked_once_a_step_and_not_once_a_layer(
    residual: str, reads: int, n_layers: int
) -> None:
    model = small_model(residual=residual, layers=("full",), n_layers=n_layers)
    with CountingReads() as reading:
        model(small_tokens()).sum().backward()
    assert reading.count == reads
