import pytest

from harness.factors import flatten, level_text, snake_case, sort_levels


def test_keys_are_those_that_users_type():
    flat = flatten(
        {
            "attention": {"kind": "lsh", "n_hashes": 4, "n_buckets": [4, 8]},
            "hashing": {"_target_": "reformer.hashing.CrossPolytope"},
            "task": {"_target_": "harness.tasks.copy.Copy", "length": 128},
            "model": {"layers": ["local", "lsh"], "axial_shape": None},
            "seed": 0,
        }
    )
    assert flat == {
        "attention": "lsh",
        "attention.n_hashes": 4,
        "attention.n_buckets": "[4,8]",
        "hashing": "cross_polytope",
        "task": "copy",
        "task.length": 128,
        "model.layers": "[local,lsh]",
        "model.axial_shape": None,
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("name", "snake"),
    [
        ("Copy", "copy"),
        ("CrossPolytope", "cross_polytope"),
        ("MQAR", "mqar"),
        ("LRAText", "lra_text"),
        ("x", "x"),
    ],
)
def test_class_names_become_option_names(name, snake):
    assert snake_case(name) == snake


@pytest.mark.parametrize(
    ("level", "text"),
    [
        (None, "null"),
        (float("nan"), "null"),
        (True, "true"),
        (4, "4"),
        (4.0, "4"),
        (0.003, "0.003"),
        ("lsh", "lsh"),
    ],
)
def test_levels_read_as_typed(level, text):
    assert level_text(level) == text


def test_numbers_sort_by_value_and_words_as_typed():
    assert sort_levels(["16", "2", "128"]) == ["2", "16", "128"]
    assert sort_levels(["1e-3", "0.0001", "null"]) == ["0.0001", "1e-3", "null"]
    assert sort_levels(
        ["reversible", "plain", "checkpoint"], typed=["plain", "checkpoint", "reversible"]
    ) == [
        "plain",
        "checkpoint",
        "reversible",
    ]
    assert sort_levels(["b", "a", "a"]) == ["a", "b"]
    assert sort_levels(["10", "nan", "9"]) == ["9", "10", "nan"]
