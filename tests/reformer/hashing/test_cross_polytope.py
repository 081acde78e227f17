import math

import pytest
import torch
from torch import Tensor

from reformer import CrossPolytope, lsh_attention
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal

ROUNDS = 5


def hashed(
    vectors: Tensor, n_buckets: int | tuple[int, int], *, seed: int = 3, data_rotation: bool = False
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    family = CrossPolytope(data_rotation=data_rotation)
    return family(vectors, n_hashes=ROUNDS, n_buckets=n_buckets, generator=generator)


def rotation(columns: int, *, seed: int = 3) -> Tensor:
    """Hugging Face's draw: [heads, dim, rounds, rotation size // 2]."""
    return torch.randn(HEADS, DIM, ROUNDS, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_buckets", [2, 6, 16])
def test_a_seed_names_the_rotation_of_hugging_face(n_buckets: int) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM, dtype=torch.float32)
    p = torch.einsum("bmtd,mdhr->bmhtr", vectors, rotation(n_buckets // 2))
    assert torch.equal(hashed(vectors, n_buckets), torch.cat([p, -p], dim=-1).argmax(dim=-1))


def test_factors_are_digits_of_a_mixed_radix_number_the_first_fastest() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM, dtype=torch.float32)
    p = torch.einsum("bmtd,mdhr->bmhtr", vectors, rotation(2 + 3))
    first = torch.cat([p[..., :2], -p[..., :2]], dim=-1).argmax(dim=-1)
    second = torch.cat([p[..., 2:], -p[..., 2:]], dim=-1).argmax(dim=-1)
    assert torch.equal(hashed(vectors, (4, 6)), first + 4 * second)


def test_opposite_vectors_land_in_opposite_buckets() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    assert torch.equal((hashed(vectors, 16) + 8) % 16, hashed(-vectors, 16))


@pytest.mark.parametrize("angle", [1e-6, 1e-4, 1e-3, 3e-3, 0.01, 0.05, 0.5, 1.5, 2.5, 3.1, math.pi])
def test_two_buckets_collide_with_one_minus_angle_over_pi(angle: float) -> None:
    predicted = CrossPolytope().collision_probability(angle, n_buckets=2, dim=DIM)
    assert predicted == pytest.approx(1 - angle / math.pi, abs=1e-12)


@pytest.mark.parametrize("n_buckets", [2, 16, 64, (8, 16)])
def test_the_collision_curve_is_a_probability_that_falls_with_the_angle(
    n_buckets: int | tuple[int, int],
) -> None:
    angles = [0.0, 1e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, math.pi]
    curve = [CrossPolytope().collision_probability(a, n_buckets=n_buckets, dim=DIM) for a in angles]
    assert all(p is not None and 0 <= p <= 1 for p in curve)
    assert curve == sorted(curve, key=lambda p: -(p or 0))
    assert curve[0] == pytest.approx(1, abs=1e-4)
    assert curve[1] == pytest.approx(1, abs=3e-4)
    assert curve[-1] == pytest.approx(0, abs=1e-9)


def test_at_right_angles_all_buckets_are_as_likely_as_each_other() -> None:
    for n_buckets in (2, 6, 16):
        predicted = CrossPolytope().collision_probability(math.pi / 2, n_buckets=n_buckets, dim=DIM)
        assert predicted == pytest.approx(1 / n_buckets, abs=1e-4)


@pytest.mark.parametrize("seq", [2, 3, SEQ])
def test_data_rotations_are_differences_of_two_vectors_of_the_sequence(seq: int) -> None:
    vectors, columns = normal(BATCH, HEADS, seq, DIM), 3
    ids = hashed(vectors, 2 * columns, data_rotation=True)
    generator = torch.Generator().manual_seed(3)
    first = torch.randint(seq, (HEADS, ROUNDS, columns), generator=generator)
    second = (first + torch.randint(1, seq, first.shape, generator=generator)) % seq
    assert (first != second).all()
    for b, h, r in ((0, 0, 0), (1, 2, 4)):
        pairs = zip(first[h, r].tolist(), second[h, r].tolist(), strict=True)
        rotation = torch.stack([vectors[b, h, two] - vectors[b, h, one] for one, two in pairs])
        p = vectors[b, h] @ rotation.T
        assert torch.equal(ids[b, h, r], torch.cat([p, -p], dim=-1).argmax(dim=-1))


def test_data_rotations_make_a_bucket_depend_on_other_tokens() -> None:
    assert not CrossPolytope(data_rotation=True).token_wise
    vectors = normal(BATCH, HEADS, SEQ, DIM)
    changed = torch.cat([vectors[:, :, :17], normal(BATCH, HEADS, SEQ - 17, DIM, seed=1)], dim=2)
    before, after = (hashed(x, 16, data_rotation=True)[..., :17] for x in (vectors, changed))
    assert (before != after).double().mean() > 0.2


def test_a_sequence_of_one_vector_has_no_differences_and_one_bucket() -> None:
    assert hashed(normal(BATCH, HEADS, 1, DIM), 16, data_rotation=True).unique().tolist() == [0]


def test_strict_causality_refuses_data_rotations_and_the_others_take_them() -> None:
    qk = normal(BATCH, HEADS, SEQ, DIM)
    settings = {"n_hashes": 2, "chunk_length": 5, "hashing": CrossPolytope(data_rotation=True)}
    says = r"hashing=CrossPolytope\(data_rotation=True\): .* 'strict' forbids; use .* or causality='bucket'"
    with pytest.raises(ValueError, match=says):
        lsh_attention(qk, qk, **settings)
    for allowed in ({"causality": "bucket"}, {"causality": "published"}, {"causal": False}):
        assert lsh_attention(qk, qk, **settings, **allowed).isfinite().all()
    ids = torch.zeros(BATCH, HEADS, 2, SEQ, dtype=torch.int64)
    assert lsh_attention(qk, qk, **settings, buckets=ids).isfinite().all()
