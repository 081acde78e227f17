"""Hydra finds the sweeper here.

It executes this module afresh whenever it looks for plugins; what lies in a module of its own, whose
name it skips, is imported once and stays the same class.
"""

from hydra_plugins.harness_sweeper._errors import COMPOSITION_ERRORS, explain
from hydra_plugins.harness_sweeper._sweeper import HarnessSweeper, most_threads, placement_of, plain_config

__all__ = [
    "COMPOSITION_ERRORS",
    "HarnessSweeper",
    "explain",
    "most_threads",
    "placement_of",
    "plain_config",
]
