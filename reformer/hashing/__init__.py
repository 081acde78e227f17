"""Locality-sensitive hash families: `vectors → bucket ids`, one family a file."""

from reformer.hashing.buckets import Buckets
from reformer.hashing.cross_polytope import CrossPolytope
from reformer.hashing.family import HashFamily
from reformer.hashing.hyperplane import Hyperplane
from reformer.hashing.random import Random

__all__ = ["Buckets", "CrossPolytope", "HashFamily", "Hyperplane", "Random"]
