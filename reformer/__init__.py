"""The Reformer: attention by locality-sensitive hashing, reversible layers, memory-honest parts."""

from reformer.attention import (
    cross_attention,
    full_attention,
    full_standard_attention,
    local_attention,
    lsh_attention,
    oracle_attention,
)
from reformer.config import ReformerConfig
from reformer.encoder_decoder import ReformerEncoderDecoder
from reformer.generation import DecodeState, RecomputeWarning
from reformer.hashing import (
    BitSampling,
    Codeword,
    CrossPolytope,
    HadamardCrossPolytope,
    HashFamily,
    Hyperplane,
    OrthogonalHyperplane,
    Random,
    Syndrome,
)
from reformer.models import ReformerClassifier, ReformerLM, ReformerMaskedLM
from reformer.pretrained import load_pretrained, save_pretrained

__all__ = [
    "BitSampling",
    "Codeword",
    "CrossPolytope",
    "DecodeState",
    "HadamardCrossPolytope",
    "HashFamily",
    "Hyperplane",
    "OrthogonalHyperplane",
    "Random",
    "RecomputeWarning",
    "ReformerClassifier",
    "ReformerConfig",
    "ReformerEncoderDecoder",
    "ReformerLM",
    "ReformerMaskedLM",
    "Syndrome",
    "cross_attention",
    "full_attention",
    "full_standard_attention",
    "load_pretrained",
    "local_attention",
    "lsh_attention",
    "oracle_attention",
    "save_pretrained",
]
