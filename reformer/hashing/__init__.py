"""Locality-sensitive hash families: `vectors → bucket ids`, one family a file."""

from reformer.hashing.bit_sampling import BitSampling
from reformer.hashing.buckets import Buckets
from reformer.hashing.codeword import Codeword
from reformer.hashing.cross_polytope import CrossPolytope
from reformer.hashing.family import HashFamily
from reformer.hashing.hadamard_cross_polytope import HadamardCrossPolytope
from reformer.hashing.hyperplane import Hyperplane
from reformer.hashing.orthogonal_hyperplane import OrthogonalHyperplane
from reformer.hashing.random import Random
from reformer.hashing.syndrome import Syndrome

__all__ = [
    "BitSampling",
    "Buckets",
    "Codeword",
    "CrossPolytope",
    "HadamardCrossPolytope",
    "HashFamily",
    "Hyperplane",
    "OrthogonalHyperplane",
    "Random",
    "Syndrome",
]
