import itertools

import pytest
import torch
from torch import Tensor

from reformer import BitSampling, Codeword
from reformer.hashing import bits
from reformer.hashing.buckets import Buckets
from tests.reformer.helpers import BATCH, HEADS, SEQ, normal

ROUNDS, DIM = 5, 19


def hashed(vectors: Tensor, n_buckets: Buckets) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return Codeword()(vectors, n_hashes=ROUNDS, n_buckets=n_buckets, generator=generator)


def places(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return bits.distinct_positions(HEADS, ROUNDS, dim=DIM, count=count, generator=generator)


def words(length: int) -> list[tuple[int, ...]]:
    """The first-order Reed–Muller code: all affine functions of the place's binary digits, by id."""
    linear = [tuple((i & j).bit_count() % 2 for j in range(length)) for i in range(length)]
    return linear + [tuple(1 - bit for bit in word) for word in linear]


def nearest(received: tuple[int, ...]) -> int:
    """The slow twin: the first of the words at the smallest Hamming distance."""
    distances = [sum(a != b for a, b in zip(word, received, strict=True)) for word in words(len(received))]
    return distances.index(min(distances))


def signs(vector: Tensor) -> tuple[int, ...]:
    return tuple(int(value > 0) for value in vector.tolist())


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16])
def test_the_code_has_two_words_a_place_half_the_length_apart(length: int) -> None:
    code = words(length)
    assert len({*code}) == 2 * length
    for one, other in itertools.combinations(code, 2):
        distance = sum(a != b for a, b in zip(one, other, strict=True))
        assert distance in {length / 2, length}


@pytest.mark.parametrize("n_buckets", [2, 4, 8, 16, 32])
def test_an_id_is_the_nearest_word_and_of_several_the_first(n_buckets: int) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    ids, chosen = hashed(vectors, n_buckets), places(n_buckets // 2)
    for b, h, r, i in itertools.product(range(BATCH), range(HEADS), range(ROUNDS), range(SEQ)):
        assert ids[b, h, r, i] == nearest(signs(vectors[b, h, i, chosen[h, r]]))


def test_each_factor_has_a_code_and_coordinates_of_its_own() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    ids, chosen = hashed(vectors, (8, 16)), places(4 + 8)
    b, h, r = 1, 2, 4
    for i in range(SEQ):
        received = signs(vectors[b, h, i, chosen[h, r]])
        assert ids[b, h, r, i] == nearest(received[:4]) + 8 * nearest(received[4:])


def test_every_word_with_less_than_a_quarter_of_its_bits_flipped_keeps_its_bucket() -> None:
    length = 16
    chosen = places(length)[0, 0]
    for word, flips in itertools.product(range(2 * length), [(), (3,), (0, 9), (2, 7, 15)]):
        vector = torch.zeros(DIM)
        vector[chosen] = torch.tensor(words(length)[word]) * 2.0 - 1.0
        vector[chosen[list(flips)]] *= -1
        assert hashed(vector.expand(1, HEADS, 1, DIM), 2 * length)[0, 0, 0, 0] == word


@pytest.mark.parametrize("n_buckets", [2, (2, 2)])
def test_the_smallest_codes_are_bit_sampling(n_buckets: Buckets) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    generator = torch.Generator().manual_seed(3)
    sampled = BitSampling()(vectors, n_hashes=ROUNDS, n_buckets=n_buckets, generator=generator)
    assert torch.equal(hashed(vectors, n_buckets), sampled)


def test_of_four_buckets_every_word_is_one_too() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    generator = torch.Generator().manual_seed(3)
    sampled = BitSampling()(vectors, n_hashes=ROUNDS, n_buckets=4, generator=generator)
    renamed = {
        (a, b) for a, b in zip(hashed(vectors, 4).flatten().tolist(), sampled.flatten().tolist(), strict=True)
    }
    assert len(renamed) == 4


def test_more_coordinates_than_there_are_are_refused_where_they_are_known(unchecked: None) -> None:
    says = (
        "n_buckets=64: the codeword family takes 32 distinct coordinates, half of each factor, and vectors "
        "have 19; use 32 or fewer, a pair of factors, or larger heads"
    )
    Codeword().check(64)
    Codeword().check(64, dim=32)
    Codeword().check(32, dim=DIM)
    Codeword().check((8, 8), dim=DIM)
    with pytest.raises(ValueError, match=says):
        Codeword().check(64, dim=DIM)
    with pytest.raises(ValueError, match=says):
        hashed(normal(BATCH, HEADS, SEQ, DIM), 64)


def test_counts_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="the codeword family makes powers of two; use 8 or 16"):
        Codeword().check(12)
