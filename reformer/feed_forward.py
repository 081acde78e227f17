"""The feed-forward layer."""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

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

    Source of the gates: Shazeer 2020, "GLU variants improve Transformer".
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.function = _FUNCTIONS[config.activation]
        self.gated = config.activation in _GATED
        width = config.feed_forward_width
        self.wide = nn.Linear(config.d_model, 2 * width if self.gated else width)
        self.narrow = nn.Linear(width, config.d_model)

    def forward(
        self, x: Float[Tensor, "batch rows d_model"], *, dropout_p: float = 0.0
    ) -> Float[Tensor, "batch rows d_model"]:
        """The layer, where that share of the wide activations is dropped."""
        inner = F.dropout(self._activate(self.wide(x)), dropout_p)
        out: Tensor = self.narrow(inner)
        return out

    def _activate(self, wide: Float[Tensor, "batch rows wide"]) -> Float[Tensor, "batch rows d_ff"]:
        if not self.gated:
            return self.function(wide)
        gate, value = wide.chunk(2, dim=-1)
        return self.function(gate) * value
