import math

import pytest
import torch
from torch import Tensor

from reformer import BitSampling, Syndrome
from reformer.hashing.syndrome import even_minus_odd, parity_checks
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal

ROUNDS, CHECKS = 5, 3


def hashed(vectors: Tensor, *, row_weight: int | None = None, n_buckets: int = 2**CHECKS) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return Syndrome(row_weight=row_weight)(vectors, n_hashes=ROUNDS, n_buckets=n_buckets, generator=generator)


def checks(row_weight: int, *shape: int, dim: int = DIM) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return parity_checks(*shape, dim=dim, row_weight=row_weight, generator=generator)


@pytest.mark.parametrize(("row_weight", "ones"), [(1, 1), (3, 3), (DIM, DIM), (None, 4)])
def test_an_id_is_the_parities_of_the_checked_signs_as_a_binary_number(
    row_weight: int | None, ones: int
) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    ids = hashed(vectors, row_weight=row_weight)
    matrices = checks(ones, HEADS, ROUNDS, CHECKS)
    for b, h, r, i in ((0, 0, 0, 0), (1, 2, 4, 17)):
        expected = 0
        for place, row in enumerate(matrices[h, r].tolist()):
            signs = [
                value > 0 for value, checked in zip(vectors[b, h, i].tolist(), row, strict=True) if checked
            ]
            expected += (sum(signs) % 2) << place
        assert ids[b, h, r, i] == expected


@pytest.mark.parametrize("row_weight", [1, 3, DIM])
def test_every_check_has_its_weight_and_is_drawn_on_its_own(row_weight: int) -> None:
    rows = checks(row_weight, 4000, 2)
    assert (rows.sum(dim=-1) == row_weight).all()
    shares = rows.double().mean(dim=0)
    assert shares.sub(row_weight / DIM).abs().max() < 5 * math.sqrt(0.25 / 4000)
    # Two rows of one matrix meet as often as strangers do: they may even be equal.
    equal = (rows[:, 0] == rows[:, 1]).all(dim=-1).double().mean()
    assert float(equal) == pytest.approx(1 / math.comb(DIM, row_weight), abs=0.03)


def krawtchouk(w: int, t: int, *, dim: int) -> int:
    """The slow twin: K_w(t) = Σ_j (−1)^j C(t, j)·C(dim − t, w − j)."""
    return sum((-1) ** j * math.comb(t, j) * math.comb(dim - t, w - j) for j in range(w + 1))


@pytest.mark.parametrize("dim", [1, 2, 7, 64])
def test_even_minus_odd_is_the_krawtchouk_polynomial(dim: int) -> None:
    for w in {1, (dim + 1) // 2, dim}:
        expected = [krawtchouk(w, t, dim=dim) / math.comb(dim, w) for t in range(dim + 1)]
        assert even_minus_odd(dim, row_weight=w) == pytest.approx(expected, abs=1e-15)


def test_the_collision_curve_of_long_vectors_is_a_probability() -> None:
    for flip_rate in (0.0, 1e-4, 0.3, 1.0):
        predicted = Syndrome().collision_probability(flip_rate, n_buckets=16, dim=1024)
        assert predicted is not None
        assert 0 <= predicted <= 1 + 1e-9


def test_checks_of_one_coordinate_are_bit_sampling_with_replacement() -> None:
    # One check cannot repeat itself, so it is bit sampling; more of them collide a little more often.
    for flip_rate in (0.05, 0.3):
        one, four = (
            (
                Syndrome(row_weight=1).collision_probability(flip_rate, n_buckets=n, dim=DIM),
                BitSampling().collision_probability(flip_rate, n_buckets=n, dim=DIM),
            )
            for n in (2, 16)
        )
        assert one[0] == pytest.approx(one[1])
        assert four[0] is not None
        assert four[1] is not None
        assert 1 < four[0] / four[1] < 1.4


def test_checks_share_the_flips_so_their_chances_do_not_multiply() -> None:
    for flip_rate in (0.05, 0.1):
        one = Syndrome().collision_probability(flip_rate, n_buckets=2, dim=16)
        four = Syndrome().collision_probability(flip_rate, n_buckets=16, dim=16)
        assert one is not None
        assert four is not None
        assert four > 1.2 * one**4


def test_to_a_dense_syndrome_a_single_flip_is_as_good_as_a_stranger() -> None:
    dim, heads = 64, 20_000
    one = normal(heads, 1, dim, dtype=torch.float32)
    flipped = one.clone()
    flipped[:, :, 0] *= -1
    vectors = torch.cat([one, flipped], dim=1)[None]

    def collisions(family: Syndrome | BitSampling) -> float:
        ids = family(vectors, n_hashes=1, n_buckets=16, generator=torch.Generator().manual_seed(3))
        return float((ids[..., 0] == ids[..., 1]).double().mean())

    assert collisions(Syndrome()) == pytest.approx(1 / 16, abs=0.01)
    assert collisions(BitSampling()) == pytest.approx(60 / 64, abs=0.01)
    assert collisions(Syndrome(row_weight=1)) == pytest.approx((63 / 64) ** 4, abs=0.01)


def test_a_check_without_coordinates_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"row_weight=0: .* one coordinate at least; use row_weight=1 or more"
    ):
        Syndrome(row_weight=0)


def test_a_check_of_more_coordinates_than_there_are_is_refused(unchecked: None) -> None:
    says = "row_weight=8: a parity check takes distinct coordinates, and vectors have 7; use row_weight=7"
    Syndrome(row_weight=8).check(16)
    with pytest.raises(ValueError, match=says):
        Syndrome(row_weight=8).check(16, dim=DIM)
    with pytest.raises(ValueError, match=says):
        hashed(normal(BATCH, HEADS, SEQ, DIM), row_weight=8)


def test_counts_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="the syndrome family makes powers of two; use 8 or 16"):
        Syndrome().check(12)
