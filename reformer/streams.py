"""The two residual streams of a stack, and how they become one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Streams(NamedTuple):
    """Both streams, equal in shape."""

    first: Float[Tensor, "batch seq d_model"]
    second: Float[Tensor, "batch seq d_model"]

    def each(self, function: Callable[[Tensor], Tensor]) -> Streams:
        """The function of either stream."""
        return Streams(function(self.first), function(self.second))

    def merged(self, merge: str) -> Float[Tensor, "batch seq width"]:
        """As one: `concat`, side by side, or their `mean`."""
        if merge == "concat":
            return torch.cat(self, dim=-1)
        return (self.first + self.second) / 2
