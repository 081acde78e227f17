import doctest
import gc
import importlib.util
import json
import random
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import reformer
from harness.probes import Counter, CpuAllocator
from harness.probes.memory import held_bytes
from reformer import (
    BitSampling,
    Codeword,
    CrossPolytope,
    HadamardCrossPolytope,
    HashFamily,
    Hyperplane,
    OrthogonalHyperplane,
    Random,
    ReformerConfig,
    ReformerLM,
    ReformerMaskedLM,
    Syndrome,
)
from reformer.attention import options
from reformer.kernels import flash, native
from tests.reformer.helpers import integers


def unwrapped() -> Any:
    """The module as users import it: checks of shapes hold on to arguments, and so to sizes, to the end."""
    spec = importlib.util.spec_from_file_location(
        "unwrapped_cost", Path(reformer.__file__).with_name("cost.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["unwrapped_cost"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cost = unwrapped()
step_cost, Symbols = cost.step_cost, cost.Symbols
attention_complexity, transformer_complexity = cost.attention_complexity, cost.transformer_complexity

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, fused=True),
    "adam": partial(torch.optim.Adam, fused=True),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True),
}

DEFAULTS: dict[str, Any] = {
    "batch": 2,
    "seq": 256,
    "optimizer": "adamw",
    "compiled": False,
    "vocab_size": 128,
    "max_length": 512,
    "d_model": 64,
    "n_heads": 4,
    "n_layers": 2,
    "n_hashes": 2,
    "chunk_length": 32,
    "backend": "reference",
}
STANDARD = ("full_standard",)

CASES: dict[str, dict[str, Any]] = {
    "lsh": {},
    "plain": {"residual": "plain"},
    "checkpoint": {"residual": "checkpoint", "n_layers": 3},
    "on a grid": {"residual": "reversible_exact"},
    "deep": {"n_layers": 5, "chunk_length": 16},
    "a layer": {"n_layers": 1},
    "8 rounds": {"n_hashes": 8},
    "short chunks": {"n_hashes": 1, "chunk_length": 4, "batch": 3},
    "one chunk": {"n_hashes": 3, "chunk_length": 256},
    "filled chunks": {"seq": 250, "residual": "plain", "layers": ("lsh", "local")},
    "factorised": {"n_buckets": (8, 16)},
    "many buckets": {"n_buckets": 512, "n_hashes": 4, "chunk_length": 8},
    "two before": {"n_chunks_before": 2, "local_n_chunks_before": 2, "layers": ("lsh", "local")},
    "published": {"causality": "published", "n_chunks_after": 1},
    "bucket": {"causality": "bucket", "duplicates": "sum"},
    "rolled": {"causality": "published", "seams": "reference", "n_hashes": 3},
    "rolled buckets": {"causality": "bucket", "seams": "reference"},
    "rolled sum": {"causality": "published", "seams": "reference", "duplicates": "sum"},
    "local": {"layers": ("local",), "local_chunk_length": 16},
    "full": {"layers": ("full",), "residual": "plain"},
    "full, reversible": {"layers": ("full",), "seq": 512},
    "standard": {"layers": ("full_standard",), "residual": "plain"},
    "standard, longer": {"layers": ("full_standard",), "seq": 1024, "max_length": 1024},
    "oracle": {"layers": ("oracle",), "chunk_length": 8},
    "mixed": {"layers": ("local", "lsh", "full", "full_standard"), "n_layers": 4},
    "mixed, plain": {"layers": ("local", "lsh", "full", "full_standard"), "n_layers": 4, "residual": "plain"},
    "blocks": {"ff_chunk_length": 100, "loss_chunk_length": 64, "vocab_size": 512, "d_ff": 256},
    "blocks, plain": {
        "ff_chunk_length": 32,
        "loss_chunk_length": 100,
        "residual": "plain",
        "layers": STANDARD,
    },
    "some heads": {"heads_at_once": 1, "n_layers": 3},
    "some heads, tiled": {
        "heads_at_once": 3,
        "ff_chunk_length": 100,
        "loss_chunk_length": 64,
        "backend": "auto",
        "seq": 2048,
        "max_length": 2048,
        "batch": 3,
        "layers": ("lsh", "local"),
    },
    "some heads, dropout": {
        "heads_at_once": 2,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "positions": "rotary",
        "norm": "rms_norm",
        "layers": ("lsh", "full_standard"),
    },
    "tied": {"tie_weights": True, "merge": "mean", "vocab_size": 512},
    "heads": {"d_head": 24, "n_heads": 3, "d_model": 96, "batch": 4},
    "no batch": {"batch": 1, "d_model": 128, "positions": "axial"},
    "gated": {"activation": "swiglu", "norm": "rms_norm", "positions": "sinusoidal", "layers": STANDARD},
    "gated blocks": {"activation": "geglu", "ff_chunk_length": 64, "residual": "plain"},
    "relu": {
        "activation": "relu",
        "positions": "rotary",
        "residual": "plain",
        "layers": ("lsh", "full_standard"),
    },
    "dropout": {"dropout": 0.1, "attention_dropout": 0.1, "hash_dropout": 0.1, "layers": ("lsh", "full")},
    "dropout, plain": {
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "layers": ("local", "full_standard"),
        "residual": "plain",
        "activation": "relu",
    },
    "both sides": {"causal": False, "layers": ("lsh", "local", "full"), "n_layers": 3},
    "both sides, own bucket": {"causal": False, "bucket_mask": True, "seams": "reference"},
    "local dropout alone": {"local_attention_dropout": 0.1, "layers": ("local", "lsh")},
    "dropout in blocks": {
        "dropout": 0.1,
        "ff_chunk_length": 16,
        "loss_chunk_length": 16,
        "residual": "plain",
    },
    "hashed in blocks": {"seq": 1024, "max_length": 1024, "n_hashes": 8, "n_buckets": 512, "n_layers": 1},
    "one head": {"n_heads": 1, "layers": ("lsh", "local", "full"), "seq": 250, "positions": "rotary"},
    "transformers": {
        "conventions": "transformers",
        "layers": ("lsh", "local"),
        "local_chunk_length": 24,
        "seq": 250,
        "duplicates": "sum",
    },
    "transformers, one chunk": {"conventions": "transformers", "seq": 30, "layers": ("lsh", "local")},
    "compiled": {"compiled": True, "backend": "auto"},
    "compiled, published": {
        "compiled": True,
        "backend": "auto",
        "causality": "published",
        "n_chunks_after": 1,
        "n_hashes": 5,
        "residual": "plain",
    },
    "compiled, longer": {
        "compiled": True,
        "backend": "native",
        "seq": 4096,
        "max_length": 4096,
        "n_hashes": 4,
        "chunk_length": 64,
        "d_head": 20,
        "heads_at_once": 2,
        "attention_dropout": 0.1,
    },
    "compiled, factorised": {
        "compiled": True,
        "backend": "auto",
        "n_buckets": (8, 16),
        "seq": 1024,
        "max_length": 1024,
    },
    "tiled": {"backend": "auto"},
    "tiled, plain": {"backend": "auto", "residual": "plain", "attention_dropout": 0.1, "seq": 250},
    "tiled, published": {"backend": "auto", "causality": "published", "n_hashes": 4, "chunk_length": 16},
    "tiled, both sides": {"backend": "flash", "causal": False, "duplicates": "sum", "positions": "rotary"},
    "tiled, many blocks": {"backend": "auto", "seq": 2048, "max_length": 2048, "batch": 3, "n_layers": 1},
    "tiled, many groups": {
        "backend": "auto",
        "seq": 8192,
        "max_length": 8192,
        "batch": 1,
        "chunk_length": 64,
    },
    "tiled, it cannot": {"backend": "auto", "causality": "bucket"},
    "adam": {"optimizer": "adam", "d_ff": 8192, "seq": 32, "layers": STANDARD},
    "sgd": {"optimizer": "sgd", "d_ff": 8192, "seq": 32, "layers": STANDARD},
}

FAMILIES: dict[HashFamily, int] = {
    CrossPolytope(): 512,
    CrossPolytope(data_rotation=True): 512,
    HadamardCrossPolytope(): 512,
    Hyperplane(): 2**16,
    OrthogonalHyperplane(): 2**16,
    BitSampling(): 2**16,
    Syndrome(): 2**16,
    Codeword(): 32,
    Random(): 512,
}
for family, n_buckets in FAMILIES.items():
    CASES[repr(family)] = {
        "hashing": family,
        "causality": "published",
        "n_buckets": n_buckets,
        "n_hashes": 8,
        "chunk_length": 4,
        "d_ff": 32,
        "n_layers": 1,
    }


def drawn(seed: int, backend: str) -> dict[str, Any]:
    """Settings at random, of those that a model can have."""
    draw = random.Random(seed)
    choice = draw.choice
    while True:
        kinds = [choice(["lsh", "lsh", "local", "full", "full_standard", "oracle"]) for _ in range(3)]
        settings: dict[str, Any] = {
            "backend": backend,
            "batch": draw.randint(1, 4),
            "seq": draw.randint(20, 500),
            "optimizer": choice(["adamw", "adam", "sgd"]),
            "vocab_size": draw.randint(10, 600),
            "d_model": choice([24, 48, 66, 96, 128]),
            "d_head": choice([None, None, 8, 20, 32]),
            "d_ff": choice([None, 40, 300]),
            "n_heads": choice([1, 2, 3, 6]),
            "n_layers": draw.randint(1, 4),
            "layers": tuple(kinds[: draw.randint(1, 3)]),
            "causal": draw.random() < 0.7,
            "n_hashes": draw.randint(1, 5),
            "n_buckets": choice([None, None, 16, (4, 8)]),
            "chunk_length": choice([4, 8, 17, 32, 64]),
            "n_chunks_before": draw.randint(1, 3),
            "n_chunks_after": choice([None, None, 0, 1, 2]),
            "causality": choice(["strict", "strict", "published", "bucket"]),
            "duplicates": choice(["count", "sum"]),
            "seams": choice(["masked", "masked", "reference"]),
            "logit_scale": choice(["trax", "sqrt_d"]),
            "bucket_mask": choice([None, None, None, True]),
            "hashing": choice(list(FAMILIES)),
            "hash_dropout": choice([0.0, 0.0, 0.1]),
            "local_chunk_length": choice([None, 10, 50]),
            "local_n_chunks_before": draw.randint(0, 2),
            "local_n_chunks_after": choice([None, 0, 1]),
            "residual": choice(["plain", "checkpoint", "reversible", "reversible_exact"]),
            "positions": choice(["learned", "axial", "sinusoidal", "rotary"]),
            "norm": choice(["layer_norm", "rms_norm"]),
            "activation": choice(["gelu", "relu", "swiglu", "geglu"]),
            "dropout": choice([0.0, 0.0, 0.1]),
            "attention_dropout": choice([0.0, 0.0, 0.1]),
            "local_attention_dropout": choice([None, None, 0.0, 0.2]),
            "heads_at_once": choice([None, None, 1, 2]),
            "ff_chunk_length": choice([None, None, 16, 100]),
            "loss_chunk_length": choice([None, None, 16, 100]),
            "tie_weights": choice([False, True]),
            "merge": choice(["concat", "mean"]),
            "conventions": choice(["own"] * 6 + ["transformers"]),
        }
        with suppress(ValueError):
            Case.of(**settings)
            return settings


#: Configs at random, as many as there is time for.
DRAWN = {f"{backend} {seed}": (seed, backend) for backend in ("reference", "auto") for seed in range(8)}
MANY = {f"{backend} {seed}": (seed, backend) for backend in ("reference", "auto") for seed in range(8, 48)}


@dataclass(frozen=True)
class Case:
    """A config at work."""

    config: ReformerConfig
    batch: int
    seq: int
    optimizer: str
    #: Whether the compiled kernel is there.
    compiled: bool

    @staticmethod
    def of(**settings: Any) -> "Case":
        given = DEFAULTS | settings
        work = {name: given.pop(name) for name in ("batch", "seq", "optimizer", "compiled")}
        return Case(ReformerConfig(**given), **work)

    def cost(self) -> Any:
        return step_cost(
            self.config,
            batch=self.batch,
            seq=self.seq,
            optimizer=self.optimizer,
            compiled=self.compiled,
        )

    def model(self) -> torch.nn.Module:
        return ReformerLM(self.config) if self.config.causal else ReformerMaskedLM(self.config)


@dataclass(frozen=True)
class Measured:
    """A second step of training, as the harness's probes see it."""

    flops: dict[str, int]
    saved_bytes: int
    peaks: dict[str, int]


def measured(case: Case) -> Measured:
    model = case.model()
    optimizer = OPTIMIZERS[case.optimizer](model.parameters())
    tokens, targets = (integers(case.config.vocab_size, case.batch, case.seq, seed=seed) for seed in (0, 1))
    losses: list[torch.Tensor] = []
    phases: dict[str, Callable[[], object]] = {
        "forward": lambda: losses.append(model.loss(tokens, targets)),
        "backward": lambda: losses[-1].backward(),
        "optimizer": lambda: (optimizer.step(), optimizer.zero_grad(set_to_none=True)),
    }
    for run in phases.values():
        run()
    losses.clear()
    states = (value for state in optimizer.state.values() for value in state.values())
    tensors = [value for value in states if isinstance(value, torch.Tensor)]
    allocator = CpuAllocator(held_bytes([*model.parameters(), *tensors, tokens, targets]))
    for name, run in phases.items():
        with allocator.phase(name):
            run()
    losses.clear()
    flops = {}
    for name, run in phases.items():
        counter = Counter()
        with counter.phase(name):
            run()
        flops[name] = int(counter.samples()[0].values[0])
    *peaks, saved = allocator.samples()
    return Measured(flops, int(saved.values[0]), {str(peak.phase): int(peak.values[0]) for peak in peaks})


def measure(names: Sequence[str], *, compiled: bool) -> None:
    """Print what these cases cost."""
    torch.set_num_threads(1)
    if not compiled:
        # Without its compiled kernel, `auto` is the tiled path.
        native.missing = lambda: "left out here"  # type: ignore[assignment]
    gc.collect()
    # The probes collect garbage around each phase: what is there now is none.
    gc.freeze()
    print(json.dumps({name: asdict(measured(named(name))) for name in names}))


def named(name: str) -> "Case":
    return Case.of(**(CASES[name] if name in CASES else drawn(*(DRAWN | MANY)[name])))


def measured_apart(names: Sequence[str], *, compiled: bool = False) -> dict[str, Measured]:
    """From a process of its own, since the checks of shapes hold on to arguments for the length of a call."""
    code = f"from {__name__} import measure; measure({list(names)!r}, compiled={compiled})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    return {name: Measured(**values) for name, values in json.loads(result.stdout.splitlines()[-1]).items()}


@pytest.fixture(scope="module")
def measurements() -> dict[str, Measured]:
    compiled = [name for name, settings in CASES.items() if settings.get("compiled")]
    others = [name for name in CASES if name not in compiled]
    return measured_apart([*others, *DRAWN]) | measured_apart(compiled, compiled=True)


def held(by_part: Mapping[str, int]) -> int:
    return sum(by_part.values())


# Against what the probes count.


@pytest.mark.parametrize("name", CASES)
def test_operations_are_exactly_those_that_are_counted(measurements: dict[str, Measured], name: str) -> None:
    counted, ours = measurements[name].flops, Case.of(**CASES[name]).cost().flops_by_phase
    assert ours["forward"] == counted["forward"]
    assert ours["backward"] + ours.get("recompute", 0) == counted["backward"]
    assert counted["optimizer"] == 0


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_within_a_twentieth_of_what_is_allocated(
    measurements: dict[str, Measured], name: str
) -> None:
    allocated, ours = measurements[name], Case.of(**CASES[name]).cost()
    assert ours.saved_bytes == pytest.approx(allocated.saved_bytes, rel=0.05)
    assert ours.peak_bytes == pytest.approx(max(allocated.peaks.values()), rel=0.05)
    for phase, peak in allocated.peaks.items():
        assert held(ours.peaks[phase]) == pytest.approx(peak, rel=0.1), phase


def assert_as_measured(case: Case, found: Measured) -> None:
    """Operations are those that are counted, bytes within a tenth of those that are allocated."""
    ours = case.cost()
    again = ours.flops_by_phase.get("recompute", 0)
    assert ours.flops_by_phase["forward"] == found.flops["forward"]
    assert ours.flops_by_phase["backward"] + again == found.flops["backward"]
    assert ours.saved_bytes == pytest.approx(found.saved_bytes, rel=0.1)
    assert {phase: held(peak) for phase, peak in ours.peaks.items()} == pytest.approx(found.peaks, rel=0.1)


@pytest.mark.parametrize("name", DRAWN)
def test_configs_at_random_cost_what_is_measured(measurements: dict[str, Measured], name: str) -> None:
    assert_as_measured(named(name), measurements[name])


@pytest.mark.slow
def test_many_configs_at_random_cost_what_is_measured() -> None:
    for name, found in measured_apart(list(MANY)).items():
        assert_as_measured(named(name), found)


def test_blocks_of_the_tiled_path_and_of_hashing_are_those_of_their_modules() -> None:
    assert (cost.PAIRS, cost.ROWS, cost.COORDINATES) == (flash.PAIRS, flash.ROWS, options._COORDINATES)


@pytest.mark.parametrize("name", ["lsh", "mixed", "tied", "no batch", "gated", "relu"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    case = Case.of(**CASES[name])
    assert case.cost().parameters == sum(parameter.numel() for parameter in case.model().parameters())


# Without torch.

ALONE = """
import importlib.util, json, sys
from types import SimpleNamespace

sys.modules["torch"] = None
path, settings, layers, family, work = json.loads(sys.argv[1])
spec = importlib.util.spec_from_file_location("cost", path)
cost = sys.modules["cost"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cost)
config = SimpleNamespace(**settings, kind=layers.__getitem__, hashing=type(family, (), {})())
found = cost.step_cost(config, **work)
assert "reformer" not in sys.modules
print(json.dumps([found.flops, found.saved_bytes, found.peak_bytes, found.parameters]))
"""
#: What is read of a config besides `kind` and `hashing`.
READ = """
vocab_size max_length d_model feed_forward_width n_heads head_width joined_width n_layers causal
n_hashes bucket_count chunk_length n_chunks_before n_chunks_after causality duplicates seams
bucket_mask hash_dropout heads_at_once local_chunk_length local_n_chunks_before local_n_chunks_after residual
positions axial_grid axial_split norm activation dropout attention_dropout ff_chunk_length
loss_chunk_length tie_weights backend local_dropout conventions shortest_chunk length_multiple
"""


def test_it_runs_on_integers_and_words_alone_where_torch_cannot_be_imported() -> None:
    case = Case.of(**CASES["mixed"])
    config = case.config
    settings = {name: getattr(config, name) for name in READ.split()}
    layers = [config.kind(layer) for layer in range(config.n_layers)]
    work = {"batch": case.batch, "seq": case.seq}
    argument = json.dumps([str(Path(cost.__file__)), settings, layers, type(config.hashing).__name__, work])
    result = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, argument], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 0, result.stderr
    ours = case.cost()
    assert json.loads(result.stdout) == [ours.flops, ours.saved_bytes, ours.peak_bytes, ours.parameters]


# What must hold of any step.


@pytest.mark.parametrize("name", CASES)
def test_parts_and_phases_add_up(name: str) -> None:
    case = Case.of(**CASES[name])
    ours = case.cost()
    assert set(ours.flops_by_part) <= {"projections", "hash", "attend", "feed_forward", "head"}
    assert sum(ours.flops_by_part.values()) == sum(ours.flops_by_phase.values()) == ours.flops
    assert sum(ours.saved_by_part.values()) == ours.saved_bytes
    assert held(ours.peak_by_part) == ours.peak_bytes == max(map(held, ours.peaks.values()))
    for peak in ours.peaks.values():
        assert peak["parameters"] == 4 * ours.parameters
    assert ours.peaks["forward"]["optimizer"] == 4 * ours.parameters * (1 if case.optimizer == "sgd" else 2)
    assert ours.peaks["optimizer"]["gradients"] == 4 * ours.parameters


def test_what_runs_again_is_what_a_block_runs_but_for_the_hash() -> None:
    plain, checkpoint, reversible = (
        Case.of(residual=residual).cost() for residual in ("plain", "checkpoint", "reversible")
    )
    again = reversible.flops - plain.flops
    assert checkpoint.flops == reversible.flops
    assert again == reversible.flops_by_phase["recompute"]
    outside = plain.flops_by_part["hash"] + plain.flops_by_part["head"] // 3
    assert again == plain.flops_by_phase["forward"] - outside
    assert reversible.flops_by_part["hash"] == plain.flops_by_part["hash"]


def test_a_reversible_layer_adds_its_buckets_alone() -> None:
    def saved(residual: str, layers: int) -> int:
        return Case.of(residual=residual, n_layers=layers).cost().saved_bytes

    buckets = 4 * 2 * 4 * 2 * 256
    assert saved("reversible", 9) - saved("reversible", 8) == buckets
    assert saved("checkpoint", 9) - saved("checkpoint", 8) == buckets + 2 * 4 * 2 * 256 * 64
    assert saved("plain", 9) - saved("plain", 8) > 50 * buckets


def test_feed_forward_blocks_bound_what_is_wide() -> None:
    def peak(length: int | None) -> int:
        case = Case.of(ff_chunk_length=length, d_ff=4096, layers=("full_standard",))
        return held(case.cost().peaks["backward"])

    # Kept at once: the wide layer before and behind its activation, and the gradient of either.
    whole = 3 * 4 * 2 * 256 * 4096
    assert peak(None) - peak(16) > 0.8 * whole * (1 - 16 / 256)


def test_a_million_tokens_fit_where_the_last_streams_alone_are_kept() -> None:
    def of(residual: str, backend: str = "auto") -> Any:
        config = ReformerConfig(
            vocab_size=256,
            max_length=2**20,
            d_model=256,
            n_layers=6,
            n_hashes=1,
            positions="axial",
            heads_at_once=1,
            ff_chunk_length=4096,
            loss_chunk_length=4096,
            residual=residual,
            backend=backend,
        )
        return step_cost(config, batch=1, seq=2**20)

    reversible, plain = of("reversible"), of("plain")
    stream, buckets = 4 * 2**20 * 256, 4 * 4 * 2**20
    # Both streams, and of each layer the buckets.
    assert reversible.saved_bytes == 2 * stream + 6 * buckets
    assert plain.saved_bytes > 10 * reversible.saved_bytes
    assert reversible.peak_bytes < 9.5 * 2**30 < 40 * 2**30 < plain.peak_bytes
    at_once = of("plain", "reference")
    assert at_once.saved_bytes > 20 * reversible.saved_bytes
    assert at_once.peak_bytes > 90 * 2**30
    assert 1.15 < reversible.flops / plain.flops < 1.4


def test_the_example_in_the_documentation_gives_what_it_says() -> None:
    assert doctest.testmod(cost) == doctest.TestResults(failed=0, attempted=4)


# The paper's tables.

PAPER = Symbols(b=1, l=2**16, n_h=8, d_k=64, n_r=4, n_c=2**11, n_l=12, d_model=512, d_ff=2048)


def test_attention_variants_are_those_of_table_1() -> None:
    for kind in ("scaled_dot_product", "memory_efficient"):
        row = attention_complexity(kind, PAPER)
        assert row.memory == row.time == row.pairs == 8 * 2**32
    row = attention_complexity("lsh", PAPER)
    assert row.memory == row.time == 8 * 4 * 2**16 * 128**2
    short = Symbols(b=3, l=32, n_h=5, d_k=4096, n_r=2, n_c=8)
    for kind in ("scaled_dot_product", "memory_efficient", "lsh"):
        assert attention_complexity(kind, short).time == 3 * 5 * 32 * 4096


def test_the_printed_time_of_lsh_attention_is_too_large_by_the_length_of_a_chunk_and_a_bound() -> None:
    row = attention_complexity("lsh", PAPER)
    assert row.time == 8 * (PAPER.l // PAPER.n_c) * row.pairs


@pytest.mark.parametrize("chunk_length", [16, 32, 256])
def test_pairs_are_what_lsh_attention_multiplies(chunk_length: int) -> None:
    case = Case.of(chunk_length=chunk_length, residual="plain", n_layers=1, n_hashes=3)
    sizes = Symbols(b=2, l=256, n_h=4, d_k=16, n_r=3, n_c=256 // chunk_length)
    pairs = attention_complexity("lsh", sizes).pairs
    # A pair is a product of width 16 with a key and one with a value; backward takes two more of each, and
    # the sum over a row of weights times their gradients.
    assert case.cost().flops_by_part["attend"] == pairs * (3 * 2 * 2 * 16 + 2)


def test_transformer_variants_are_those_of_table_3() -> None:
    n_l, wide, narrow = 12, 2**16 * 2048, 2**16 * 512
    dense, hashed = 8 * 2**32, 8 * 4 * 2**16 * 128**2
    expected = {
        "transformer": (dense * n_l, (wide + dense) * n_l),
        "reversible": (dense, (8 * wide + dense) * n_l),
        "chunked_reversible": (dense, (8 * wide + dense) * n_l),
        "lsh": (hashed * n_l, (wide + hashed) * n_l),
        "reformer": (hashed, (wide + hashed) * n_l),
    }
    for variant, row in expected.items():
        found = transformer_complexity(variant, PAPER)
        assert (found.memory, found.time) == row, variant
    short = Symbols(b=3, l=4, n_h=1, d_k=1, n_c=4, n_l=5, d_model=128, d_ff=512)
    assert transformer_complexity("lsh", short).memory == 3 * 4 * 512 * 5
    assert transformer_complexity("reformer", short).memory == 3 * 4 * 128
    assert transformer_complexity("lsh", PAPER).pairs == n_l * attention_complexity("lsh", PAPER).pairs
    assert transformer_complexity("transformer", PAPER).pairs == n_l * dense
    assert narrow < wide < dense


# What is refused.


def test_an_unknown_optimizer_family_or_row_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="optimizer='lion': use one of adamw, adam, sgd"):
        step_cost(Case.of().config, batch=1, seq=8, optimizer="lion")

    class Ours(Random):
        pass

    with pytest.raises(ValueError, match=r"hashing=.*Ours\(\): its cost is not known; add it"):
        Case.of(hashing=Ours()).cost()
    with pytest.raises(ValueError, match="'sparse' is no row of the table: use one of scaled_dot_product"):
        attention_complexity("sparse", PAPER)
    with pytest.raises(ValueError, match="'sparse' is no row of the table: use one of transformer"):
        transformer_complexity("sparse", PAPER)
