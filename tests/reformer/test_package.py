"""The package as a whole."""

import importlib
import pkgutil
import re
from pathlib import Path

import jaxtyping
import pytest
import torch

import reformer

PACKAGES = ("reformer", "reformer.attention", "reformer.hashing")
SOURCE = Path(reformer.__file__).parent
#: What moves a global stream, and not a generator of its own.
SEEDING = re.compile(
    r"(?<!Generator\(\)\.)(?<!Generator\(device\)\.)\bmanual_seed"
    r"|\bset_rng_state|\brandom\.(?:seed|set_?state)|\b(?:torch|cuda)\.seed|seed_all|set_seed"
)
#: The files that may, each in one way.
MAY_SEED = {
    # These run in the process that was forked for one trial alone.
    "harness/workloads/attention.py": "manual_seed",
    "harness/workloads/session.py": "manual_seed",
    "reformer/randomness.py": "set_rng_state",  # a replay, after which the stream is where it was
}


@pytest.mark.parametrize("name", PACKAGES)
def test_what_a_package_exports_exists_and_is_sorted(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__all__ == sorted(package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)
    for export in package.__all__:
        assert getattr(package, export).__doc__ if export != "Buckets" else hasattr(package, export)


def test_every_module_imports_on_its_own() -> None:
    names = [info.name for info in pkgutil.walk_packages([str(SOURCE)], prefix="reformer.")]
    assert len(names) > 20
    for name in names:
        assert importlib.import_module(name).__doc__


def test_no_line_seeds_a_global_random_stream() -> None:
    root = SOURCE.parent
    found = {
        (path.relative_to(root).as_posix(), match.group())
        for package in (SOURCE, root / "harness")
        for path in package.rglob("*.py")
        for match in SEEDING.finditer(path.read_text(encoding="utf-8"))
    }
    assert found == set(MAY_SEED.items())


@pytest.mark.parametrize(
    "line",
    [
        "torch.manual_seed(0)",
        "torch.random.manual_seed(0)",
        "torch.cuda.manual_seed(0)",
        "torch.cuda.manual_seed_all(1)",
        "torch.seed()",
        "torch.cuda.seed()",
        "torch.set_rng_state(state)",
        "torch.cuda.set_rng_state(state, device)",
        "random.seed(0)",
        "random.setstate(state)",
        "np.random.seed(0)",
        "numpy.random.set_state(state)",
        "transformers.set_seed(0)",
    ],
)
def test_that_search_would_find_a_seeding_line(line: str) -> None:
    assert SEEDING.search(line)


@pytest.mark.parametrize(
    "line",
    [
        "torch.Generator().manual_seed(3)",
        "torch.Generator(device).manual_seed(3)",
        "torch.get_rng_state()",
        "np.random.default_rng(seed)",
        "random.Random(seed)",
    ],
)
def test_that_search_leaves_generators_of_their_own_alone(line: str) -> None:
    assert not SEEDING.search(line)


def test_shapes_are_checked_in_these_tests() -> None:
    qk, v = torch.zeros(2, 3, 5, 7), torch.zeros(2, 3, 4, 7)
    with pytest.raises(jaxtyping.TypeCheckError):
        reformer.full_attention(qk, v)
    with pytest.raises(jaxtyping.TypeCheckError):
        reformer.lsh_attention(
            qk, qk, n_hashes=1, chunk_length=3, buckets=torch.zeros(2, 3, 1, 4, dtype=torch.int64)
        )
