"""Attention as functions of tensors: LSH, local, full, cross and the oracle, and the modules around them."""

from reformer.attention.cross import cross_attention
from reformer.attention.full import full_attention, full_standard_attention
from reformer.attention.local import local_attention
from reformer.attention.lsh import lsh_attention
from reformer.attention.oracle import oracle_attention

__all__ = [
    "cross_attention",
    "full_attention",
    "full_standard_attention",
    "local_attention",
    "lsh_attention",
    "oracle_attention",
]
