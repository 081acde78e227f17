"""Attention as functions of tensors: LSH, local and full, and the modules around them."""

from reformer.attention.full import full_attention, full_standard_attention
from reformer.attention.local import local_attention
from reformer.attention.lsh import lsh_attention

__all__ = ["full_attention", "full_standard_attention", "local_attention", "lsh_attention"]
