import math

import pytest
import torch

from reformer.positions import AxialPositions, LearnedPositions, SinusoidalPositions, build_positions
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


@pytest.mark.parametrize("d_model", [13, 14])
@pytest.mark.parametrize("seq", [0, 1, 29])
def test_sinusoidal_positions_are_sines_and_cosines_in_turn(d_model: int, seq: int) -> None:
    config = small_config(positions="sinusoidal", d_model=d_model, embedding_std=0.5)
    table = build_positions(config)
    assert isinstance(table, SinusoidalPositions)
    found = table.double()(seq)
    assert found.shape == (seq, d_model)
    for p in range(seq):
        for i in range(d_model):
            angle = p / 10_000 ** (2 * (i // 2) / d_model)
            wave = math.cos(angle) if i % 2 else math.sin(angle)
            assert float(found[p, i]) == pytest.approx(0.5 * math.sqrt(2) * wave, abs=1e-7)


def test_sinusoidal_positions_have_the_scale_of_embeddings_and_nothing_to_learn() -> None:
    positions = build_positions(small_config(positions="sinusoidal", embedding_std=0.25))
    assert isinstance(positions, SinusoidalPositions)
    assert not list(positions.parameters())
    assert not positions.state_dict()
    assert float(positions(31).square().mean().sqrt()) == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinusoidal_positions_are_in_the_dtype_of_the_model(dtype: torch.dtype) -> None:
    positions = build_positions(small_config(positions="sinusoidal"))
    assert isinstance(positions, SinusoidalPositions)
    assert positions.to(dtype)(5).dtype == dtype


def test_rotary_positions_are_added_to_nothing() -> None:
    assert build_positions(small_config(positions="rotary", d_head=6)) is None
