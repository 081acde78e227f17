"""Normalisation of what enters a branch or a head."""

from torch import nn

from reformer.config import ReformerConfig


def build_norm(config: ReformerConfig, *, width: int) -> nn.LayerNorm | nn.RMSNorm:
    """The norm of a config, over the last axis, with a learned scale."""
    kind = nn.RMSNorm if config.norm == "rms_norm" else nn.LayerNorm
    return kind(width, eps=config.norm_eps)
