import pytest

from harness.metrics.catalogue import KNOWN, describe, effect_columns
from harness.metrics.names import column_name, pooled, split_column


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("step_s", None, {}), "step_s"),
        (("peak_alloc_bytes", "forward", {}), "peak_alloc_bytes.forward"),
        (("accuracy", None, {"n_hashes": 8}), "accuracy@n_hashes=8"),
        (
            (
                "accuracy",
                None,
                {"zeta": 1, "hash_seed": 2, "hashing": "random", "attention": "lsh", "n_hashes": 4},
            ),
            "accuracy@n_hashes=4,attention=lsh,hashing=random,hash_seed=2,zeta=1",
        ),
    ],
)
def test_names_and_back(parts, name):
    metric, phase, at = parts
    assert column_name(metric, phase=phase, at=at) == name
    assert split_column(name) == (metric, phase, {key: str(value) for key, value in at.items()})


def test_hash_seeds_are_pooled_unless_nothing_else_is_set():
    assert pooled({"n_hashes": 8, "hash_seed": 1}) == {"n_hashes": 8}
    assert pooled({"hash_seed": 1}) == {"hash_seed": 1}
    assert pooled({}) == {}


def test_every_known_metric_describes_itself():
    assert all(describe(name) == metric for name, metric in KNOWN.items())


@pytest.mark.parametrize(
    ("column", "unit", "label"),
    [
        ("peak_alloc_bytes.forward", "bytes", "peak memory, forward"),
        ("accuracy@n_hashes=8", "fraction", "accuracy, n_hashes=8"),
        ("sort_s", "s", "sort s"),
        ("cache_bytes", "bytes", "cache bytes"),
        ("prefill_tokens_per_s", "tokens/s", "prefill tokens per s"),
        ("agreement", "", "agreement"),
    ],
)
def test_other_columns_get_words_and_a_unit(column, unit, label):
    metric = describe(column)
    assert (metric.unit, metric.label) == (unit, label)


def test_effects_are_told_on_outcomes_only():
    assert "accuracy" in effect_columns()
    assert not {"chance_accuracy", "parameters", "final_loss"} & set(effect_columns())
