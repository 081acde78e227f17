"""Position embeddings: learned, and axial."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

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


def build_positions(config: ReformerConfig) -> LearnedPositions | AxialPositions:
    """The position embedding of a config."""
    return AxialPositions(config) if config.positions == "axial" else LearnedPositions(config)
