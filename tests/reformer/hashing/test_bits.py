import math

import pytest
import torch

from reformer.hashing import bits


def positions(*shape: int, dim: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return bits.distinct_positions(*shape, dim=dim, count=count, generator=generator)


@pytest.mark.parametrize("count", [1, 4, 7])
def test_positions_are_distinct_coordinates(count: int) -> None:
    chosen = positions(3, 5, dim=7, count=count)
    assert chosen.shape == (3, 5, count)
    assert all(len({*row}) == count and {*row} <= {*range(7)} for row in chosen.flatten(0, 1).tolist())


def test_every_coordinate_is_as_likely_as_the_others_in_every_place() -> None:
    chosen = positions(20_000, dim=7, count=3)
    for place in range(3):
        shares = chosen[:, place].bincount(minlength=7) / 20_000
        assert shares.sub(1 / 7).abs().max() < 5 * math.sqrt(1 / 7 * 6 / 7 / 20_000)


def test_the_first_bit_is_the_least() -> None:
    assert bits.as_number(torch.tensor([[True, False, False], [False, True, True]])).tolist() == [1, 6]


@pytest.mark.parametrize("flip_rate", [0.0, 1e-3, 0.1, 0.5, 0.93, 1.0])
def test_flip_counts_are_binomial(flip_rate: float) -> None:
    chances = bits.flip_counts(11, flip_rate=flip_rate)
    assert chances == pytest.approx(
        [math.comb(11, t) * flip_rate**t * (1 - flip_rate) ** (11 - t) for t in range(12)], abs=1e-12
    )


def test_flip_counts_of_long_vectors_do_not_overflow() -> None:
    chances = bits.flip_counts(4096, flip_rate=0.3)
    assert sum(chances) == pytest.approx(1, abs=1e-9)
    assert sum(t * chance for t, chance in enumerate(chances)) == pytest.approx(0.3 * 4096)
