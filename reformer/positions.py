"""Position embeddings: learned, axial, sinusoidal. Rotary positions are in attention, not added here."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reformer.attention.rotary import angles
from reformer.config import ReformerConfig


class LearnedPositions(nn.Module):
    """One vector a position."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(config.max_length, config.d_model).normal_(std=config.embedding_std)
        )

    def forward(self, seq: int) -> Float[Tensor, "seq d_model"]:
        return self.weight[:seq]

    def at(self, positions: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """The vectors of these positions."""
        return self.weight[positions]


class AxialPositions(nn.Module):
    """Position = a cell of a grid; its vector is the row's part joined to the column's.

    Any length up to the product of the grid's sides works, in training too.

    Source: Kitaev, Kaiser, Levskaya 2020, §4 (axial positional embeddings, after Ho et al. 2019).
    """

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        (rows, columns), (row_width, column_width) = config.axial_grid, config.axial_split
        self.rows = nn.Parameter(torch.empty(rows, row_width).normal_(std=config.embedding_std))
        self.columns = nn.Parameter(torch.empty(columns, column_width).normal_(std=config.embedding_std))

    def forward(self, seq: int) -> Float[Tensor, "seq d_model"]:
        columns = self.columns.shape[0]
        used = -(-seq // columns)
        by_row = self.rows[:used].repeat_interleave(columns, dim=0)
        by_column = self.columns.repeat(used, 1)
        return torch.cat([by_row, by_column], dim=-1)[:seq]

    def at(self, positions: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """The vectors of these positions."""
        columns = self.columns.shape[0]
        return torch.cat([self.rows[positions // columns], self.columns[positions % columns]], dim=-1)


class SinusoidalPositions(nn.Module):
    """Sines and cosines of each position at geometric wavelengths, in turn; nothing to learn.

    At the scale of the token embeddings, whose standard deviation is the root mean square of the sinusoids.

    Source: Vaswani et al. 2017, §3.5.
    """

    #: A buffer, so that it is on the device and in the dtype of the model; not in its state.
    amplitude: Float[Tensor, ""]

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        amplitude = torch.tensor(math.sqrt(2) * config.embedding_std)
        self.register_buffer("amplitude", amplitude, persistent=False)

    def forward(self, seq: int) -> Float[Tensor, "seq d_model"]:
        return self.at(torch.arange(seq, device=self.amplitude.device))

    def at(self, positions: Int[Tensor, "*batch seq"]) -> Float[Tensor, "*batch seq d_model"]:
        """The vectors of these positions."""
        angle = angles(positions, dim=self.d_model)
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., : self.d_model]
        return waves.to(self.amplitude.dtype) * self.amplitude


PositionEmbedding = LearnedPositions | AxialPositions | SinusoidalPositions


def build_positions(config: ReformerConfig) -> PositionEmbedding | None:
    """What a config adds to token embeddings; None if attention alone knows positions."""
    match config.positions:
        case "learned":
            return LearnedPositions(config)
        case "axial":
            return AxialPositions(config)
        case "sinusoidal":
            return SinusoidalPositions(config)
        case _:
            return None
