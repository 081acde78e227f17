import pytest
import torch

from reformer.positions import AxialPositions, LearnedPositions, build_positions
from tests.reformer.helpers import small_config


@pytest.mark.parametrize("seq", [0, 1, 7, 31])
def test_learned_positions_are_the_first_rows_of_a_table(seq: int) -> None:
    positions = build_positions(small_config())
    assert isinstance(positions, LearnedPositions)
    assert torch.equal(positions(seq), positions.weight[:seq])
    assert positions(seq).shape == (seq, 14)


@pytest.mark.parametrize("seq", [0, 1, 5, 8, 9, 29, 32])
def test_axial_positions_join_a_row_and_a_column(seq: int) -> None:
    positions = build_positions(small_config(positions="axial", axial_shape=(4, 8), axial_dims=(3, 11)))
    assert isinstance(positions, AxialPositions)
    table = positions(seq)
    assert table.shape == (seq, 14)
    for p in range(seq):
        assert torch.equal(table[p, :3], positions.rows[p // 8])
        assert torch.equal(table[p, 3:], positions.columns[p % 8])


def test_axial_positions_differ_everywhere_with_few_parameters() -> None:
    positions = build_positions(small_config(positions="axial", max_length=31))
    assert len({tuple(row) for row in positions(31).tolist()}) == 31
    assert sum(p.numel() for p in positions.parameters()) < 31 * 14 / 2


@pytest.mark.parametrize("kind", ["learned", "axial"])
def test_both_start_at_the_given_scale_and_learn(kind: str) -> None:
    config = small_config(positions=kind, max_length=1009, d_model=58, embedding_std=0.5)
    positions = build_positions(config)
    for parameter in positions.parameters():
        assert float(parameter.detach().std()) == pytest.approx(0.5, rel=0.1)
    positions(1009).sum().backward()
    for parameter in positions.parameters():
        assert parameter.grad is not None
        assert (parameter.grad > 0).all()
