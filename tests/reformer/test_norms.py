import pytest
import torch
from torch import nn

from reformer.norms import build_norm
from tests.reformer.helpers import BATCH, SEQ, assert_all_close, normal, small_config


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_a_layer_norm_has_mean_zero_and_variance_one_before_scale_and_bias(eps: float) -> None:
    norm, x = build_norm(small_config(norm_eps=eps), width=14).double(), normal(BATCH, SEQ, 14)
    nn.init.normal_(norm.weight)
    assert isinstance(norm, nn.LayerNorm)
    nn.init.normal_(norm.bias)
    centred = x - x.mean(dim=-1, keepdim=True)
    expected = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    assert_all_close([norm(x)], [expected * norm.weight + norm.bias], tolerance=1e-12)


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_an_rms_norm_has_mean_square_one_before_its_scale(eps: float) -> None:
    norm = build_norm(small_config(norm="rms_norm", norm_eps=eps), width=14).double()
    x = normal(BATCH, SEQ, 14)
    nn.init.normal_(norm.weight)
    assert isinstance(norm, nn.RMSNorm)
    expected = x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    assert_all_close([norm(x)], [expected * norm.weight], tolerance=1e-12)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_row_of_zeros_stays_finite(norm: str) -> None:
    x = torch.zeros(1, 3, 7).requires_grad_()
    out = build_norm(small_config(norm=norm), width=7)(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
