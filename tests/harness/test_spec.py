"""What a trial is: every setting reaches the model, and one that cannot be is told with its mend."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from harness import spec as spec_module
from harness.codec import SpecError
from harness.spec import OPTIMIZERS, AttentionSpec, LocalSpec, ModelSpec, TrialSpec
from reformer import Hyperplane
from reformer.attention import options
from reformer.attention.modules import Attending
from reformer.config import ACTIVATIONS, ATTENTION_KINDS, MERGES, NORMS, POSITIONS, RESIDUALS
from tests.harness.specs import trial_spec

HYPERPLANE = {"_target_": "reformer.Hyperplane"}
AXIAL = {"model__positions": "axial"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        # attention
        ({"attention__n_hashes": 0}, "n_hashes=0: must be at least 1; use n_hashes=1 or more"),
        ({"attention__chunk_length": 0}, "chunk_length=0: must be at least 1; use chunk_length=1 or more"),
        (
            {"attention__n_chunks_before": -1},
            "n_chunks_before=-1: must be at least 0; use n_chunks_before=0 or more",
        ),
        (
            {"attention__n_chunks_before": 0},
            "n_chunks_before=0: causality 'strict' looks back one chunk at least; use n_chunks_before=1 or "
            "causality='bucket'",
        ),
        (
            {"attention__n_chunks_after": -1},
            "n_chunks_after=-1: must be at least 0; use n_chunks_after=0 or more",
        ),
        (
            {"attention__n_chunks_after": 1},
            "n_chunks_after=1: causality 'strict' sees nothing later in the sorted order; use "
            "n_chunks_after=0 or causality='published'",
        ),
        (
            {"attention__n_buckets": 5},
            "n_buckets=5: it must be an even number ≥ 2 (a bucket is a signed axis of a rotation); use 6 or "
            "None for the automatic count",
        ),
        (
            {"attention__n_buckets": [4, 3]},
            "n_buckets=(4, 3): each factor must be an even number ≥ 2 (a bucket is a signed axis of a "
            "rotation); use (4, 4) or None for the automatic count",
        ),
        (
            {"attention__n_buckets": 6, "hashing": HYPERPLANE},
            "n_buckets=6: the hyperplane family makes powers of two; use 4 or 8",
        ),
        (
            {"local__chunk_length": 0},
            "local.chunk_length=0: must be at least 1; use local.chunk_length=1 or more",
        ),
        (
            {"local__n_chunks_before": -1},
            "local.n_chunks_before=-1: must be at least 0; use local.n_chunks_before=0 or more",
        ),
        # model
        *(
            ({f"model__{name}": 0}, f"{name}=0: must be at least 1; use {name}=1 or more")
            for name in (
                "d_model",
                "d_ff",
                "n_heads",
                "d_head",
                "n_layers",
                "heads_at_once",
                "ff_chunk_length",
                "loss_chunk_length",
            )
        ),
        (
            {"model__d_model": 15},
            "d_model=15: not divisible by n_heads=2; use d_model=16 or set d_head",
        ),
        ({"model__layers": []}, f"layers=(): name at least one of {', '.join(ATTENTION_KINDS)}"),
        (
            {**AXIAL, "model__axial_shape": [4, 7]},
            "axial_shape=(4, 7): two factors whose product is at least max_length=32; use None for an "
            "automatic shape",
        ),
        (
            {**AXIAL, "model__axial_shape": [-8, -8]},
            "axial_shape=(-8, -8): two factors whose product is at least max_length=32; use None for an "
            "automatic shape",
        ),
        (
            {**AXIAL, "model__axial_dims": [8, 9]},
            "axial_dims=(8, 9): two widths that add up to d_model=16; use None for halves",
        ),
        (
            {**AXIAL, "model__axial_dims": [17, -1]},
            "axial_dims=(17, -1): two widths that add up to d_model=16; use None for halves",
        ),
        (
            {"model__max_length": 31},
            "model.max_length=31: shorter than task.length=32; use model.max_length=32 or null",
        ),
        (
            {"model__positions": "rotary", "model__d_head": 7},
            "d_head=7: positions='rotary' turns pairs of coordinates; use d_head=8",
        ),
        ({"model__norm_eps": 0.0}, "norm_eps=0.0: keeps a division finite; give more than 0"),
        (
            {"model__layers": ["oracle"], "model__max_length": 4097},
            "max_length=4097: 'oracle' layers hold every pair of at most 4096 tokens; use a smaller "
            "max_length or 'lsh'",
        ),
        ({"attention__hash_dropout": 1.0}, "hash_dropout=1.0: a share; give 0 ≤ hash_dropout < 1"),
        ({"model__dropout": 1.0}, "dropout=1.0: a share; give 0 ≤ dropout < 1"),
        (
            {"model__attention_dropout": -0.1},
            "attention_dropout=-0.1: a share; give 0 ≤ attention_dropout < 1",
        ),
        ({"model__embedding_std": 0.0}, "embedding_std=0.0: a standard deviation; give more than 0"),
        (
            {"model__tie_weights": True},
            "tie_weights=True: the head sees 2·d_model values with merge='concat'; use merge='mean'",
        ),
        # train
        ({"train__steps": 0}, "train.steps=0: must be at least 1"),
        ({"train__batch_size": 0}, "train.batch_size=0: must be at least 1"),
        ({"train__lr": -0.1}, "train.lr=-0.1: must not be negative"),
        ({"train__warmup_steps": -1}, "train.warmup_steps=-1: must not be negative"),
        ({"train__weight_decay": -0.1}, "train.weight_decay=-0.1: must not be negative"),
        ({"train__clip": -1.0}, "train.clip=-1.0: must not be negative"),
        ({"train__beta1": 1.0}, "train.beta1=1.0: give 0 ≤ beta1 < 1"),
        ({"train__beta2": -0.1}, "train.beta2=-0.1: give 0 ≤ beta2 < 1"),
        # evaluate
        ({"evaluate__n_hashes": [1, 0]}, "evaluate.n_hashes=[1, 0]: each must be at least 1"),
        ({"evaluate__hash_seeds": []}, "evaluate.hash_seeds=[]: give at least one seed, for example [0]"),
        (
            {"evaluate__controls": ["full", "oracle"], "task__length": 4098},
            "evaluate.controls=['full', 'oracle']: the oracle holds every pair of at most 4096 tokens, and "
            "task.length=4098; leave it out or use a shorter task",
        ),
        # the rest
        ({"task__length": 31}, "task.length=31: `0 w 0 w` has an even length; use 32"),
        ({"threads": 0}, "threads=0: must be at least 1"),
        ({"seed": -1}, "seed=-1: give 0 ≤ seed < 2**31"),
        ({"seed": 2**31}, "seed=2147483648: give 0 ≤ seed < 2**31"),
        ({"repeat": -1}, "repeat=-1: give 0 ≤ repeat < 2**31"),
    ],
)
def test_what_cannot_be_is_told_with_its_value_the_rule_and_the_mend(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        trial_spec(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("attention__kind", "attention.kind", ATTENTION_KINDS),
        ("attention__causality", "causality", options.CAUSALITIES),
        ("attention__duplicates", "duplicates", options.DUPLICATES),
        ("attention__seams", "seams", options.SEAMS),
        ("attention__logit_scale", "logit_scale", options.LOGIT_SCALES),
        ("attention__backend", "backend", options.BACKENDS),
        ("model__layers", "layers", ATTENTION_KINDS),
        ("model__residual", "residual", RESIDUALS),
        ("model__positions", "positions", POSITIONS),
        ("model__norm", "norm", NORMS),
        ("model__activation", "activation", ACTIVATIONS),
        ("model__merge", "merge", MERGES),
        ("train__optimizer", "train.optimizer", OPTIMIZERS),
        ("evaluate__controls", "evaluate.controls", ("full", "oracle", "random", "knock_out")),
        ("device", "device", ("cpu", "cuda")),
        ("dtype", "dtype", ("float32", "bfloat16", "float16")),
    ],
)
def test_an_unknown_word_is_told_with_all_known_ones(key: str, name: str, words: tuple[str, ...]) -> None:
    with pytest.raises(SpecError) as caught:
        trial_spec(**{key: "nonsense"})
    assert str(caught.value) == f"{name}='nonsense': use one of {', '.join(words)}"


@pytest.mark.parametrize(
    "settings",
    [
        {"attention__n_chunks_before": 0, "attention__causality": "bucket"},
        {"attention__n_chunks_after": 1, "attention__causality": "published"},
        {"attention__n_buckets": [4, 4]},
        {"attention__n_buckets": None, "hashing": HYPERPLANE},
        {**AXIAL, "model__axial_shape": [4, 8], "model__axial_dims": [1, 15]},
        {"model__d_model": 15, "model__d_head": 3},
        {"model__tie_weights": True, "model__merge": "mean"},
        {"model__max_length": 33},
        {"train__warmup_steps": 0, "train__clip": 0.0, "train__lr": 0.0},
        {"evaluate__n_hashes": [], "evaluate__controls": []},
        {"seed": 2**31 - 1},
    ],
)
def test_the_mends_and_the_last_values_that_can_be_are_taken(settings: dict[str, Any]) -> None:
    trial_spec(**settings)


def named(group: type, /, **values: Any) -> Any:
    """Settings that are all different: each is its own name, where no other value is given."""
    return group(**{**{field.name: f"{group.__name__}.{field.name}" for field in fields(group)}, **values})


def test_every_setting_reaches_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = trial_spec(seed=16, hashing=HYPERPLANE, task__n_symbols=11)
    monkeypatch.setattr(spec_module, "ReformerConfig", dict)
    monkeypatch.setattr(TrialSpec, "backend", "not asked for")
    groups = {
        "": named(AttentionSpec, kind="lsh"),
        "local_": named(LocalSpec, chunk_length=101, n_chunks_before=102),
    }
    model = named(ModelSpec, max_length=103)
    given: Any = replace(spec, attention=groups[""], local=groups["local_"], model=model).reformer_config()
    expected = {"vocab_size": 12, "hash_seed": 16, "hashing": Hyperplane(), **vars(model)}
    for prefix, group in groups.items():
        expected |= {f"{prefix}{name}": value for name, value in vars(group).items() if name != "kind"}
    assert given == expected


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({"attention__backend": "flash"}, "flash"),
        ({"dtype": "bfloat16"}, "flash"),  # the compiled kernel computes in float32 alone
        ({"attention__backend": "reference"}, "reference"),
        ({"attention__causality": "published", "attention__seams": "reference"}, "reference"),
        ({"model__layers": ["local"], "attention__backend": "flash", "device": "cuda"}, ""),
        (
            {
                "model__layers": ["local", "full_standard", "lsh"],
                "model__n_layers": 5,
                "attention__backend": "reference",
            },
            "sdpa+reference",
        ),
        ({"model__layers": ["local", "lsh"], "model__n_layers": 1}, ""),
    ],
)
def test_what_will_compute_the_attention(settings: dict[str, Any], backend: str) -> None:
    assert trial_spec(**settings).backend == backend


def test_a_backend_that_cannot_is_told_before_anything_runs() -> None:
    with pytest.raises(SpecError, match="backend='flash': it runs on the CPU, not on cuda; use backend="):
        trial_spec(attention__backend="flash", device="cuda")


def test_the_task_fixes_the_length_and_the_model_may_be_longer() -> None:
    assert trial_spec(task__length=40).reformer_config().max_length == 40
    assert trial_spec(task__length=40, model__max_length=50).reformer_config().max_length == 50


def test_the_evaluation_grid_is_every_round_by_every_seed_and_the_controls() -> None:
    spec = trial_spec(
        evaluate__n_hashes=[1, 4], evaluate__hash_seeds=[0, 7], evaluate__controls=["knock_out", "random"]
    )
    assert spec.evaluate.settings() == [
        ({"n_hashes": 1, "hash_seed": 0}, Attending(n_hashes=1, hash_seed=0)),
        ({"n_hashes": 1, "hash_seed": 7}, Attending(n_hashes=1, hash_seed=7)),
        ({"n_hashes": 4, "hash_seed": 0}, Attending(n_hashes=4, hash_seed=0)),
        ({"n_hashes": 4, "hash_seed": 7}, Attending(n_hashes=4, hash_seed=7)),
        ({"attention": "knock_out"}, Attending(kind="knock_out")),
        ({"attention": "random", "hash_seed": 0}, Attending(kind="random", hash_seed=0)),
        ({"attention": "random", "hash_seed": 7}, Attending(kind="random", hash_seed=7)),
    ]
