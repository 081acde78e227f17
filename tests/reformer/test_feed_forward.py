from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from reformer.feed_forward import FeedForward
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal, small_config


def build(**settings: Any) -> FeedForward:
    torch.manual_seed(0)
    return FeedForward(small_config(**settings)).double()


def test_it_is_two_linear_layers_around_a_gelu() -> None:
    module, x = build(), normal(BATCH, SEQ, 14)
    wide = x @ module.wide.weight.T + module.wide.bias
    expected = 0.5 * wide * (1 + torch.erf(wide / 2**0.5)) @ module.narrow.weight.T + module.narrow.bias
    assert_all_close([module(x)], [expected], tolerance=1e-12)
    assert wide.shape[-1] == 17


def test_a_relu_takes_the_place_of_the_gelu() -> None:
    module, x = build(activation="relu"), normal(BATCH, SEQ, 14)
    inner = (x @ module.wide.weight.T + module.wide.bias).clamp(min=0)
    assert_all_close([module(x)], [inner @ module.narrow.weight.T + module.narrow.bias], tolerance=1e-12)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("swiglu", lambda x: x * torch.sigmoid(x)),
        ("geglu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
    ],
)
def test_gated_layers_multiply_by_a_projection_of_their_own(
    activation: str, function: Callable[[Tensor], Tensor]
) -> None:
    module, x = build(activation=activation), normal(BATCH, SEQ, 14)
    gate = x @ module.wide.weight[:17].T + module.wide.bias[:17]
    value = x @ module.wide.weight[17:].T + module.wide.bias[17:]
    expected = (function(gate) * value) @ module.narrow.weight.T + module.narrow.bias
    assert_all_close([module(x)], [expected], tolerance=1e-12)
    assert module.wide.weight.shape == (34, 14)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dropout_falls_on_the_wide_activations(activation: str) -> None:
    module, x = build(activation=activation), normal(BATCH, SEQ, 14)
    torch.nn.init.eye_(module.narrow.weight)
    torch.nn.init.zeros_(module.narrow.bias)
    torch.manual_seed(3)
    dropped, whole = module(x, dropout_p=0.25), module(x)
    # The narrow layer hands on the first 14 of 17 as they are.
    kept = dropped != 0
    assert 0.7 < float(kept.double().mean()) < 0.8
    assert_all_close([dropped[kept]], [whole[kept] / 0.75], tolerance=1e-12)
    assert (whole != 0).all()
