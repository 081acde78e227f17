"""The feed-forward layer, row block by row block."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reformer.blocks import map_blocks
from reformer.config import ReformerConfig

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
_GATED = ("swiglu", "geglu")


class FeedForward(nn.Module):
    """Two linear layers around an activation, with dropout behind it.

    Gated activations multiply f(xA) by a second projection xB; A and B are one matrix of twice the width.
    With `ff_chunk_length` neither pass ever holds more than one block of the wide activations: backward
    computes them again, a block at a time.

    Source of the gates: Shazeer 2020, "GLU variants improve Transformer".
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.chunk_length = config.ff_chunk_length
        self.function = _FUNCTIONS[config.activation]
        self.gated = config.activation in _GATED
        width = config.feed_forward_width
        self.wide = nn.Linear(config.d_model, 2 * width if self.gated else width)
        self.dropout = nn.Dropout(config.dropout)
        self.narrow = nn.Linear(width, config.d_model)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        # Read here: a block that is computed again drops what it dropped, whatever the mode has become.
        dropout_p = self.dropout.p if self.dropout.training else 0.0
        rows = partial(self._rows, dropout_p=dropout_p)
        return map_blocks(rows, x, length=self.chunk_length, random=dropout_p > 0)

    def _rows(
        self, x: Float[Tensor, "batch rows d_model"], *, dropout_p: float
    ) -> Float[Tensor, "batch rows d_model"]:
        inner = F.dropout(self._activate(self.wide(x)), dropout_p)
        out: Tensor = self.narrow(inner)
        return out

    def _activate(self, wide: Float[Tensor, "batch rows wide"]) -> Float[Tensor, "batch rows d_ff"]:
        if not self.gated:
            return self.function(wide)
        gate, value = wide.chunk(2, dim=-1)
        return self.function(gate) * value
