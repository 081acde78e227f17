"""Shared query and key: one projection, keys at unit length."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

#: As in Trax and Hugging Face: keeps the key of an all-zero query finite.
EPSILON = 1e-6


def unit_keys(qk: Float[Tensor, "*rows dim"], *, logit_scale: str = "trax") -> Float[Tensor, "*rows dim"]:
    """Keys of shared query-key attention: queries at unit length, k = q·rsqrt(mean(q²) + ε)/√dim.

    Logits are then q·k = ‖q‖·cos θ; `logit_scale="sqrt_d"` divides them once more by √dim.

    Source: Kitaev, Kaiser, Levskaya 2020, §2 "Shared-QK Transformer"; the ε is Trax's.
    """
    wide = qk if qk.dtype == torch.float64 else qk.float()
    scale = key_scale(qk.shape[-1], logit_scale=logit_scale)
    keys = wide * (wide.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt() * scale
    return keys.to(qk.dtype)


def key_scale(dim: int, *, logit_scale: str) -> float:
    """What keys of length √dim are multiplied by."""
    return 1 / math.sqrt(dim) if logit_scale == "trax" else 1 / dim
