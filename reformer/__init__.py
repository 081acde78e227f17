"""The Reformer: attention by locality-sensitive hashing, reversible layers, memory-honest parts."""

from reformer.attention import full_attention, full_standard_attention, local_attention, lsh_attention
from reformer.config import ReformerConfig
from reformer.hashing import CrossPolytope, HashFamily, Hyperplane, Random
from reformer.models import ReformerLM

__all__ = [
    "CrossPolytope",
    "HashFamily",
    "Hyperplane",
    "Random",
    "ReformerConfig",
    "ReformerLM",
    "full_attention",
    "full_standard_attention",
    "local_attention",
    "lsh_attention",
]
