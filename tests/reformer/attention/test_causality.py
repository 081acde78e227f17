"""Does an output depend on the future? In published mode yes, in strict mode no."""

from typing import Any

import pytest
import torch
from torch import Tensor

from reformer import (
    BitSampling,
    Codeword,
    CrossPolytope,
    HadamardCrossPolytope,
    HashFamily,
    Hyperplane,
    OrthogonalHyperplane,
    Random,
    Syndrome,
    full_attention,
    local_attention,
    lsh_attention,
)
from reformer.attention import reference
from tests.reformer.helpers import integers, normal, small_model
from tests.reformer.test_generation import given_buckets, recorded_buckets

SEQ, PAST = 257, 193
FAMILIES = (
    CrossPolytope(),
    HadamardCrossPolytope(),
    Hyperplane(),
    OrthogonalHyperplane(),
    BitSampling(),
    Syndrome(),
    Codeword(),
    Random(),
)


def inputs() -> tuple[Tensor, Tensor]:
    return normal(2, 3, SEQ, 13, seed=1), normal(2, 3, SEQ, 11, seed=2)


def change(x: Tensor, new: Tensor) -> Tensor:
    return torch.cat([x[:, :, :PAST], new[:, :, : SEQ - PAST]], dim=2)


def insert(x: Tensor, new: Tensor) -> Tensor:
    return torch.cat([x[:, :, :PAST], new[:, :, :37], x[:, :, PAST:]], dim=2)


def delete(x: Tensor, new: Tensor) -> Tensor:
    return torch.cat([x[:, :, :PAST], x[:, :, PAST + 37 :]], dim=2)


def lengthen(x: Tensor, new: Tensor) -> Tensor:
    return torch.cat([x, new], dim=2)


def cut(x: Tensor, new: Tensor) -> Tensor:
    return x[:, :, :PAST]


PERTURBATIONS = (change, insert, delete, lengthen, cut)
#: Random buckets are blind to content, so a change of content alone moves nothing in any mode.
CASES = [
    (family, perturb)
    for family in FAMILIES
    for perturb in PERTURBATIONS
    if (family, perturb) != (Random(), change)
]


def moved(
    perturb: Any, *, tolerance: float = 1e-12, attention: Any = lsh_attention, **settings: Any
) -> float:
    """Share of earlier outputs, over rows and heads, that a perturbation of the future moves."""
    qk, v = inputs()
    new_qk, new_v = normal(*qk.shape, seed=3), normal(*v.shape, seed=4)
    before = attention(qk, v, **settings)[:, :, :PAST]
    after = attention(perturb(qk, new_qk), perturb(v, new_v), **settings)[:, :, :PAST]
    distance = (after - before).abs().amax(dim=-1)
    return float((distance > tolerance * before.abs().amax()).double().mean())


def lsh_settings(family: HashFamily, *, n_hashes: int = 4, **settings: Any) -> dict[str, Any]:
    return {
        "n_hashes": n_hashes,
        "chunk_length": 16,
        "n_buckets": 32,
        "hashing": family,
        "generator": None,
        **settings,
    }


@pytest.mark.parametrize(("family", "perturb"), CASES)
@pytest.mark.parametrize("n_hashes", [1, 4])
@pytest.mark.parametrize("duplicates", ["count", "sum"])
def test_the_future_moves_published_outputs_and_no_strict_one(
    family: HashFamily, perturb: Any, n_hashes: int, duplicates: str
) -> None:
    settings = lsh_settings(family, n_hashes=n_hashes, duplicates=duplicates) | {"n_buckets": 16}
    assert moved(perturb, causality="published", **settings) >= 0.2
    assert moved(perturb, causality="strict", **settings) == 0


@pytest.mark.parametrize("n_chunks_before", [1, 2, 3])
@pytest.mark.parametrize("seams", ["masked", "reference"])
@pytest.mark.parametrize("perturb", PERTURBATIONS)
def test_strict_holds_with_any_look_back_and_seam(n_chunks_before: int, seams: str, perturb: Any) -> None:
    settings = lsh_settings(CrossPolytope(), n_chunks_before=n_chunks_before, seams=seams)
    assert moved(perturb, causality="published", **settings) >= 0.2
    assert moved(perturb, causality="strict", **settings) == 0


@pytest.mark.parametrize("n_buckets", [2, (4, 6), (16, 16)])
def test_strict_holds_with_few_many_and_factorised_buckets(n_buckets: Any) -> None:
    settings = lsh_settings(CrossPolytope()) | {"n_buckets": n_buckets}
    assert moved(change, causality="published", **settings) >= 0.2
    assert moved(change, causality="strict", **settings) == 0


def test_the_bucket_mode_leaks_less_than_the_published_one_but_not_nothing() -> None:
    settings = lsh_settings(CrossPolytope(), n_hashes=1) | {"n_buckets": 8}
    published = moved(change, causality="published", **settings)
    bucket = moved(change, causality="bucket", **settings)
    assert 0 < bucket < published / 2


def test_the_dense_twin_is_strict_too() -> None:
    settings = lsh_settings(CrossPolytope(), attention=reference.lsh_attention, n_hashes=2)
    assert moved(change, causality="published", **settings) >= 0.2
    assert moved(insert, causality="strict", **settings) == 0


def test_strict_in_float32_moves_only_by_rounding() -> None:
    qk, v = (x.float() for x in inputs())
    settings = lsh_settings(CrossPolytope())
    before = lsh_attention(qk, v, **settings)
    after = lsh_attention(insert(qk, -qk), insert(v, -v), **settings)
    torch.testing.assert_close(after[:, :, :PAST], before[:, :, :PAST], rtol=0, atol=1e-5)


#: Rounding of a few sums, and less than a visible set of its own makes of an output.
ROUNDING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("perturb", PERTURBATIONS)
@pytest.mark.parametrize("duplicates", ["count", "sum"])
def test_strict_in_narrow_dtypes_moves_only_by_rounding_given_the_buckets(
    dtype: torch.dtype, perturb: Any, duplicates: str
) -> None:
    qk, v = (x.to(dtype) for x in inputs())
    new_qk, new_v = (normal(*x.shape, seed=seed).to(dtype) for x, seed in ((qk, 3), (v, 4)))
    # Hashed once in float32: a token keeps its buckets wherever it stands. By position, as the vectors are.
    ids, new_ids = (
        CrossPolytope()(x.float(), n_hashes=5, n_buckets=32, generator=torch.Generator().manual_seed(0)).mT
        for x in (qk, new_qk)
    )

    def moved_share(causality: str) -> float:
        def earlier(qk: Tensor, v: Tensor, ids: Tensor) -> Tensor:
            settings: dict[str, Any] = {"n_hashes": 5, "chunk_length": 16, "duplicates": duplicates}
            out = lsh_attention(qk, v, buckets=ids.mT, causality=causality, **settings)
            return out[:, :, :PAST].double()

        before = earlier(qk, v, ids)
        after = earlier(perturb(qk, new_qk), perturb(v, new_v), perturb(ids, new_ids))
        distance = (after - before).abs().amax(dim=-1)
        return float((distance > ROUNDING[dtype] * before.abs().max()).double().mean())

    assert moved_share("published") >= 0.2
    assert moved_share("strict") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("perturb", [change, insert])
@pytest.mark.parametrize("layers", [("lsh",), ("local", "lsh", "full_standard")], ids=str)
def test_no_logit_of_a_narrow_strict_model_moves_but_by_rounding_given_the_buckets(
    dtype: torch.dtype, perturb: Any, layers: tuple[str, ...]
) -> None:
    tokens, other = integers(23, 2, SEQ), integers(23, 2, SEQ, seed=9)
    changed = perturb(tokens[:, None], other[:, None])[:, 0]

    @torch.no_grad()
    def moved_share(causality: str) -> float:
        model = small_model(
            dtype=dtype,
            causality=causality,
            layers=layers,
            max_length=307,
            chunk_length=16,
            n_buckets=32,
            n_hashes=5,
        ).eval()
        with recorded_buckets(model) as recorded:
            before = model(tokens)[:, :PAST].double()
            model(changed)
        # Those of the parallel pass for the past, and for the rest what the perturbed pass hashed it to.
        buckets = {
            layer: torch.cat([own[..., :PAST], perturbed[..., PAST:]], dim=-1)
            for layer, (own, perturbed) in recorded.items()
        }
        with given_buckets(model, buckets):
            after = model(changed)[:, :PAST].double()
        distance = (after - before).abs().amax(dim=-1)
        return float((distance > ROUNDING[dtype] * before.abs().max()).double().mean())

    assert moved_share("published") >= 0.2
    assert moved_share("strict") == 0


def test_padding_a_strict_row_behind_moves_nothing() -> None:
    qk, v = inputs()
    settings = lsh_settings(CrossPolytope())
    real = torch.ones(2, SEQ, dtype=torch.bool)
    real[:, PAST:] = False
    cut_short = lsh_attention(cut(qk, qk), cut(v, v), **settings)
    padded = lsh_attention(qk, v, padding_mask=real, **settings)
    torch.testing.assert_close(padded[:, :, :PAST], cut_short, rtol=0, atol=1e-12)


@pytest.mark.parametrize("perturb", PERTURBATIONS)
def test_full_and_local_attention_do_not_look_ahead_when_causal(perturb: Any) -> None:
    def local(qk: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        return local_attention(qk, -qk, v, chunk_length=64, causal=causal)

    for attention in (full_attention, local):
        # Of local attention only the last chunk of the past sees the next one: one token of it.
        assert moved(perturb, attention=attention, causal=False) >= 0.005
        assert moved(perturb, attention=attention, causal=True) == 0
