import dataclasses
from typing import Any

import pytest

from reformer import BitSampling, CrossPolytope, Hyperplane, ReformerConfig
from tests.reformer.helpers import small_config


def test_widths_follow_from_d_model_unless_given() -> None:
    config = ReformerConfig(vocab_size=23, max_length=31, d_model=12, n_heads=3)
    assert (config.head_width, config.feed_forward_width) == (4, 48)
    assert (small_config().head_width, small_config().feed_forward_width) == (11, 17)


def test_the_automatic_bucket_count_is_that_of_max_length() -> None:
    config = small_config(n_buckets=None, max_length=1000, chunk_length=16)
    assert config.bucket_count == 64
    assert small_config(n_buckets=(4, 6)).bucket_count == (4, 6)


def test_the_pattern_of_kinds_is_repeated() -> None:
    config = small_config(layers=("local", "lsh", "full"), n_layers=5)
    assert [config.kind(layer) for layer in range(5)] == ["local", "lsh", "full", "local", "lsh"]


def test_the_switches_of_lsh_layers_are_passed_on() -> None:
    settings: dict[str, Any] = {
        "n_hashes": 3,
        "chunk_length": 5,
        "n_chunks_before": 2,
        "n_chunks_after": 1,
        "causality": "published",
        "duplicates": "sum",
        "seams": "reference",
        "logit_scale": "sqrt_d",
        "causal": False,
        "bucket_mask": True,
        "backend": "reference",
    }
    options = small_config(**settings).lsh_options(dropout_p=0.1)
    assert {name: getattr(options, name) for name in settings} == settings
    assert options.dropout_p == 0.1
    assert small_config().lsh_options(n_hashes=7).n_hashes == 7


@pytest.mark.parametrize("max_length", [1, 2, 7, 31, 36, 37, 1000])
def test_the_automatic_position_grid_covers_max_length(max_length: int) -> None:
    rows, columns = small_config(max_length=max_length, positions="axial").axial_grid
    assert rows * columns >= max_length
    assert (rows - 1) * columns < max_length
    assert abs(rows - columns) <= 2 + max_length // 20


def test_the_position_grid_and_its_widths_can_be_given() -> None:
    config = small_config(positions="axial", axial_shape=(4, 8), axial_dims=(3, 11))
    assert (config.axial_grid, config.axial_split) == ((4, 8), (3, 11))
    assert sum(small_config(d_model=13, d_head=5).axial_split) == 13


def test_a_config_is_a_value() -> None:
    assert small_config() == small_config()
    assert hash(small_config()) == hash(small_config())
    assert dataclasses.replace(small_config(), n_hashes=3) != small_config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        small_config().n_hashes = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"vocab_size": 0}, "vocab_size=0: must be at least 1; use vocab_size=1"),
        ({"max_length": 0}, "max_length=0: must be at least 1; use max_length=1"),
        ({"d_model": 0}, "d_model=0: must be at least 1"),
        ({"n_heads": 0}, "n_heads=0: must be at least 1"),
        ({"n_layers": 0}, "n_layers=0: must be at least 1"),
        ({"d_ff": 0}, "d_ff=0: must be at least 1"),
        ({"d_head": -5}, "d_head=-5: must be at least 1"),
        ({"ff_chunk_length": 0}, "ff_chunk_length=0: must be at least 1"),
        ({"loss_chunk_length": 0}, "loss_chunk_length=0: must be at least 1"),
        ({"local_chunk_length": 0}, "local_chunk_length=0: must be at least 1"),
        ({"local_n_chunks_before": -1}, "local_n_chunks_before=-1: must be at least 0"),
        ({"chunk_length": 0}, "chunk_length=0: must be at least 1; use chunk_length=1"),
        ({"chunk_length": 0, "n_buckets": None}, "chunk_length=0: must be at least 1; use chunk_length=1"),
        ({"n_hashes": 0}, "n_hashes=0: must be at least 1"),
        ({"n_buckets": 5}, "n_buckets=5: it must be an even number ≥ 2 .*; use 6 or None"),
        ({"n_buckets": 6, "hashing": Hyperplane()}, "n_buckets=6: the hyperplane family .*; use 4 or 8"),
        (
            {"n_buckets": 4096, "hashing": BitSampling()},
            "n_buckets=4096: .* vectors have 11; use 2048 or fewer",
        ),
        (
            {"hashing": CrossPolytope(data_rotation=True)},
            r"hashing=CrossPolytope\(data_rotation=True\): .* causality 'strict' forbids; use .*causality=",
        ),
        (
            {"residual": "revertible"},
            "residual='revertible': use one of plain, checkpoint, reversible, reversible_exact",
        ),
        ({"grid_bits": 7}, "grid_bits=7: streams .* give 8 ≤ grid_bits ≤ 20"),
        ({"grid_bits": 21}, "grid_bits=21: streams .* give 8 ≤ grid_bits ≤ 20"),
        ({"positions": "none"}, "positions='none': use one of learned, axial, sinusoidal, rotary"),
        ({"merge": "sum"}, "merge='sum': use one of concat, mean"),
        ({"conventions": "hugging_face"}, "conventions='hugging_face': use one of own, transformers"),
        ({"causality": "none"}, "causality='none': use one of strict, bucket, published"),
        ({"layers": ()}, r"layers=\(\): name at least one of lsh, local, full, full_standard, oracle"),
        ({"layers": ("lsh", "lhs")}, "layers='lhs': use one of lsh, local, full, full_standard, oracle"),
        (
            {"d_model": 13, "d_head": None},
            "d_model=13: not divisible by n_heads=3; use d_model=15 or set d_head",
        ),
        ({"dropout": 1.0}, "dropout=1.0: a share; give 0 ≤ dropout < 1"),
        ({"attention_dropout": -0.5}, "attention_dropout=-0.5: a share; give 0 ≤ attention_dropout < 1"),
        ({"hash_dropout": 1.0}, "hash_dropout=1.0: a share; give 0 ≤ hash_dropout < 1"),
        ({"embedding_std": 0.0}, "embedding_std=0.0: a standard deviation; give more than 0"),
        ({"norm": "batch_norm"}, "norm='batch_norm': use one of layer_norm, rms_norm"),
        ({"norm_eps": 0.0}, "norm_eps=0.0: keeps a division finite; give more than 0"),
        ({"activation": "glu"}, "activation='glu': use one of gelu, relu, swiglu, geglu"),
        ({"local_n_chunks_after": -1}, "local_n_chunks_after=-1: must be at least 0"),
        ({"n_classes": 1}, "n_classes=1: must be at least 2; use n_classes=2 or more"),
        (
            {"bucket_mask": False},
            "bucket_mask=False: causality 'strict' .*; use bucket_mask=None or causality=",
        ),
        ({"positions": "rotary", "d_head": 5}, "d_head=5: positions='rotary' turns pairs .*; use d_head=6"),
        (
            {"layers": ("lsh", "oracle"), "max_length": 4097},
            "max_length=4097: 'oracle' layers hold .* at most 4096 tokens; use a smaller max_length or 'lsh'",
        ),
        ({"tie_weights": True}, "tie_weights=True: .* merge='concat'; use merge='mean'"),
        ({"n_chunks_before": 0}, "n_chunks_before=0: causality 'strict' .*; use n_chunks_before=1"),
        (
            {"positions": "axial", "axial_shape": (5, 6)},
            r"axial_shape=\(5, 6\): two factors whose product is at least max_length=31; use None",
        ),
        (
            {"positions": "axial", "axial_shape": (-8, -8)},
            r"axial_shape=\(-8, -8\): two factors .*; use None",
        ),
        (
            {"positions": "axial", "axial_dims": (7, 8)},
            r"axial_dims=\(7, 8\): two widths that add up to d_model=14; use None",
        ),
        ({"positions": "axial", "axial_dims": (14, 0)}, r"axial_dims=\(14, 0\): two widths .*; use None"),
    ],
)
def test_a_wrong_setting_is_a_value_error_that_names_value_rule_and_mend(
    settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        small_config(**settings)


@pytest.mark.parametrize("causality", ["bucket", "published"])
def test_rotations_from_the_data_are_allowed_where_causality_is_not_strict(causality: str) -> None:
    config = small_config(hashing=CrossPolytope(data_rotation=True), causality=causality)
    assert not config.hashing.token_wise


def test_a_width_of_one_cannot_be_divided_over_two_axes() -> None:
    with pytest.raises(ValueError, match=r"axial_dims=\(0, 1\): two widths that add up to d_model=1"):
        small_config(d_model=1, positions="axial")


def test_a_model_that_reads_both_sides_looks_ahead_and_need_not_stay_in_its_bucket() -> None:
    options = small_config(causal=False).lsh_options()
    assert (options.after, options.same_bucket, options.strict) == (1, False, False)
    assert small_config(causal=False, bucket_mask=True).lsh_options().same_bucket


@pytest.mark.parametrize(("merge", "width"), [("concat", 28), ("mean", 14)])
def test_merged_streams_are_as_wide_as_merge_says(merge: str, width: int) -> None:
    assert small_config(merge=merge).joined_width == width
