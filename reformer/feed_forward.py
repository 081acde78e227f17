"""The feed-forward layer, row block by row block."""

from jaxtyping import Float
from torch import Tensor, nn

from reformer.blocks import map_blocks
from reformer.config import ReformerConfig


class FeedForward(nn.Module):
    """Two linear layers around a GELU.

    With `ff_chunk_length` neither pass ever holds more than one block of the wide activations: backward
    computes them again, a block at a time.
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.chunk_length = config.ff_chunk_length
        self.wide = nn.Linear(config.d_model, config.feed_forward_width)
        self.activation = nn.GELU()
        self.narrow = nn.Linear(config.feed_forward_width, config.d_model)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return map_blocks(self._rows, x, length=self.chunk_length)

    def _rows(self, x: Float[Tensor, "batch rows d_model"]) -> Float[Tensor, "batch rows d_model"]:
        out: Tensor = self.narrow(self.activation(self.wide(x)))
        return out
