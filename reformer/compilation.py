"""What `torch.compile` must leave alone."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_Inputs = ParamSpec("_Inputs")
_Result = TypeVar("_Result")


def uncompiled(function: Callable[_Inputs, _Result]) -> Callable[_Inputs, _Result]:
    """The function, run as it stands also inside of what is compiled."""
    return torch.compiler.disable(function) if torch.compiler.is_compiling() else function
