from typing import Any

import pytest
import torch

from harness.probes import CpuAllocator
from reformer import CrossPolytope, HashFamily, Hyperplane
from reformer.attention import options as options_module
from reformer.attention.options import LSHOptions, hash_vectors
from reformer.kernels import native
from tests.reformer.hashing.test_family import FAMILIES
from tests.reformer.helpers import BATCH, DIM, HEADS, SEQ, normal


def options(**settings: Any) -> LSHOptions:
    return LSHOptions(**({"n_hashes": 2, "chunk_length": 5} | settings))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_hashes": 0}, "n_hashes=0: must be at least 1; use n_hashes=1 or more"),
        ({"chunk_length": -3}, "chunk_length=-3: must be at least 1; use chunk_length=1 or more"),
        ({"n_chunks_before": -1}, "n_chunks_before=-1: must be at least 0; use n_chunks_before=0 or more"),
        ({"n_chunks_after": -1}, "n_chunks_after=-1: must be at least 0; use n_chunks_after=0 or more"),
        ({"causality": "strickt"}, "causality='strickt': use one of strict, bucket, published"),
        ({"duplicates": "first"}, "duplicates='first': use one of count, sum"),
        ({"seams": "open"}, "seams='open': use one of masked, reference"),
        ({"logit_scale": "none"}, "logit_scale='none': use one of trax, sqrt_d"),
        ({"backend": "cuda"}, "backend='cuda': use one of auto, reference, native, flash, triton, flex"),
        ({"dropout_p": 1.0}, "dropout_p=1.0: a share of weights; give 0 ≤ dropout_p < 1"),
        ({"dropout_p": -0.1}, "dropout_p=-0.1: a share of weights; give 0 ≤ dropout_p < 1"),
        (
            {"n_chunks_before": 0},
            "n_chunks_before=0: causality 'strict' looks back .*; use n_chunks_before=1 or",
        ),
        (
            {"n_chunks_after": 1},
            "n_chunks_after=1: causality 'strict' sees nothing later .*; use n_chunks_after=0",
        ),
        (
            {"bucket_mask": False, "causality": "bucket"},
            "bucket_mask=False: causality 'bucket' shows .*; use bucket_mask=None or causality='published'",
        ),
    ],
)
def test_a_wrong_switch_is_a_value_error_that_names_value_rule_and_mend(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        options(**settings)


def test_what_strict_forbids_is_allowed_where_it_is_not_in_force() -> None:
    assert not options(n_chunks_before=0, causality="bucket").strict
    assert not options(n_chunks_before=0, n_chunks_after=2, causal=False).strict


@pytest.mark.parametrize(
    ("settings", "same_bucket", "after"),
    [
        ({}, True, 0),
        ({"causality": "bucket"}, True, 0),
        ({"causality": "published"}, False, 0),
        ({"causality": "published", "bucket_mask": True}, True, 0),
        ({"causal": False}, False, 1),
        ({"causal": False, "bucket_mask": True}, True, 1),
        ({"causal": False, "n_chunks_after": 0}, False, 0),
        ({"causality": "bucket", "n_chunks_after": 2}, True, 2),
    ],
)
def test_defaults_follow_from_causality(settings: dict[str, Any], same_bucket: bool, after: int) -> None:
    assert options(**settings).same_bucket is same_bucket
    assert options(**settings).after == after


def test_the_band_is_the_look_back_in_tokens() -> None:
    assert options(n_chunks_before=3).band == 15


def test_as_many_keys_as_the_chunks_before_and_after_show_in_all_rounds() -> None:
    assert options(n_hashes=2, n_chunks_before=3).n_keys == 2 * 15
    assert options(n_hashes=2, n_chunks_before=3, causal=False).n_keys == 2 * (15 + 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_vectors_are_hashed_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM).to(dtype)

    def buckets(vectors: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return hash_vectors(vectors, hashing=CrossPolytope(), n_hashes=17, n_buckets=64, generator=generator)

    plain = buckets(vectors.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(buckets(vectors), plain)
        assert torch.equal(buckets(vectors.float()), plain)


def test_float64_vectors_are_hashed_in_float64() -> None:
    # Two vectors that float32 cannot tell apart, either side of a hyperplane.
    generator = torch.Generator().manual_seed(3)
    normals = torch.randn(1, 2, 1, 1, generator=generator).double()[0, :, 0, 0]
    along = torch.tensor([-normals[1], normals[0]], dtype=torch.float64)
    vectors = torch.stack([along + 1e-10 * normals, along - 1e-10 * normals])[None, None]
    ids = hash_vectors(
        vectors, hashing=Hyperplane(), n_hashes=1, n_buckets=2, generator=torch.Generator().manual_seed(3)
    )
    assert ids.flatten().tolist() == [1, 0]


def test_hashing_is_detached() -> None:
    vectors = normal(BATCH, HEADS, SEQ, DIM).requires_grad_()
    ids = hash_vectors(vectors, hashing=CrossPolytope(), n_hashes=2, n_buckets=4, generator=torch.Generator())
    assert not ids.requires_grad
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("coordinates", [1, 400, 3000])
def test_tokens_hashed_some_at_a_time_get_the_same_buckets(
    family: HashFamily, coordinates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    qk = normal(BATCH, HEADS, SEQ, DIM, dtype=torch.float32)

    def hashed() -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return hash_vectors(qk, hashing=family, n_hashes=5, n_buckets=8, generator=generator)

    whole = hashed()
    monkeypatch.setattr(options_module, "_COORDINATES", coordinates)
    assert torch.equal(hashed().long(), whole.long())


def test_hashing_makes_no_more_coordinates_at_once_than_it_may() -> None:
    vectors = torch.randn(1, 2, 2**16, 8)
    allocator = CpuAllocator(0)
    with allocator.phase("forward"):
        ids = hash_vectors(
            vectors, hashing=CrossPolytope(), n_hashes=8, n_buckets=(64, 64), generator=torch.Generator()
        )
    (peak,) = [sample.values[0] for sample in allocator.samples() if sample.metric == "peak_alloc_bytes"]
    # All at once they would be 256 MiB, beside the ids and what finding the largest takes.
    assert peak - ids.nbytes < 3 * 4 * 2**23


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "device", "given", "says"),
    [
        ({"backend": "flash"}, CUDA, {}, "backend='flash': it runs on the CPU, not on cuda; use"),
        ({"backend": "flex"}, CPU, {}, "backend='flex': it runs on cuda, not on cpu; use backend='auto' or"),
        (
            {"backend": "flex"},
            CUDA,
            {"dtype": torch.float64},
            "backend='flex': it computes in .* float64; use",
        ),
        (
            {"backend": "flex", "dropout_p": 0.1},
            CUDA,
            {},
            "backend='flex': it drops no attention weights; use",
        ),
        ({"backend": "flex", "causality": "bucket"}, CUDA, {}, "backend='flex': .*causality='bucket'.*; use"),
        (
            {"backend": "triton"},
            CPU,
            {},
            "backend='triton': it runs on cuda, not on cpu .*TRITON_INTERPRET=1",
        ),
        ({"backend": "triton"}, CUDA, {"dtype": torch.float64}, "'triton': it computes in .* not in float64"),
        ({"backend": "triton"}, CUDA, {"width": 257}, "'triton': heads of 257 are wider than 256; use"),
        (
            {"backend": "triton", "seams": "reference", "causality": "published"},
            CUDA,
            {},
            "backend='triton': .*seams='reference'.*; use backend='auto' or 'reference'",
        ),
    ],
)
def test_a_backend_that_cannot_says_why_and_which_can(
    settings: dict[str, Any],
    device: torch.device,
    given: dict[str, Any],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options_module, "_TRITON_IS_HERE", True)
    monkeypatch.setattr(options_module, "_INTERPRETED", False)
    with pytest.raises(ValueError, match=says):
        options(**settings).backend_on(device, **given)
    assert options(**{**settings, "backend": "reference"}).backend_on(device, **given) == "reference"


def test_without_the_package_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_TRITON_IS_HERE", False)
    with pytest.raises(ValueError, match="backend='triton': the package triton is not installed; use"):
        options(backend="triton").backend_on(CUDA)
    assert options().backend_on(CUDA) == "flex"


@pytest.mark.parametrize(
    ("settings", "device", "given", "backend"),
    [
        ({}, CPU, {}, "native"),
        ({}, CPU, {"dtype": torch.float64}, "flash"),
        ({"causality": "bucket"}, CPU, {}, "reference"),
        ({}, CUDA, {"dtype": torch.bfloat16, "width": 64}, "triton"),
        ({"dropout_p": 0.1}, CUDA, {}, "triton"),
        ({}, CUDA, {"width": 300}, "flex"),
        ({"dropout_p": 0.1}, CUDA, {"width": 300}, "reference"),
        ({}, CUDA, {"dtype": torch.float64}, "reference"),
        ({"causality": "bucket"}, CUDA, {}, "reference"),
        ({}, torch.device("mps"), {}, "reference"),
    ],
)
def test_auto_takes_the_fastest_backend_that_can(
    settings: dict[str, Any],
    device: torch.device,
    given: dict[str, Any],
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(options_module, "_TRITON_IS_HERE", True)
    monkeypatch.setattr(options_module, "_INTERPRETED", False)
    monkeypatch.setattr(native, "missing", lambda: "")
    assert options(**settings).backend_on(device, **given) == backend
