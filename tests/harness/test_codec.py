"""Plain data to a spec and back, what is said about data that is none, and the identity of a trial."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import codec
from harness.codec import ALLOW_VARIABLE, OUTSIDE_SPEC, SpecError, decode, encode
from harness.record import trial_id
from harness.spec import TrialSpec
from harness.workloads.train_step import TrainStep
from reformer import CrossPolytope, Random
from tests.harness.specs import plain_spec, trial_spec


def id_of(data: Mapping[str, Any]) -> str:
    return trial_id(encode(decode(data)))


def complaint(data: Mapping[str, Any]) -> str:
    """The one line that refuses this data."""
    with pytest.raises(SpecError) as caught:
        decode(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# There and back


positive = st.integers(1, 64)
small_float = st.floats(0, 0.99)
maybe_positive = st.none() | positive
even = st.integers(1, 16).map(lambda half: 2 * half)
power_of_two = st.sampled_from([2, 4, 64])
#: The hash family with buckets that it can make.
hashings = st.tuples(
    st.sampled_from(["CrossPolytope", "Random"]), st.none() | even | st.tuples(even, even)
) | st.tuples(st.just("Hyperplane"), st.none() | power_of_two | st.tuples(power_of_two, power_of_two))
tasks = st.fixed_dictionaries(
    {
        "_target_": st.just("harness.tasks.Copy"),
        "length": st.integers(2, 64).map(lambda half: 2 * half),
        "n_symbols": st.integers(2, 200),
        "evaluation_tokens": positive,
    }
) | st.fixed_dictionaries({"_target_": st.just("harness.tasks.Text"), "length": st.integers(4, 600)})
workloads = st.just({"_target_": "harness.workloads.train.Train"}) | st.fixed_dictionaries(
    {"_target_": st.just("harness.workloads.train_step.TrainStep"), "timed_steps": positive}
)


@st.composite
def plain_specs(draw: st.DrawFn) -> dict[str, Any]:
    """Plain data of any valid spec."""
    family, n_buckets = draw(hashings)
    causality = draw(st.sampled_from(["strict", "bucket", "published"]))
    strict = causality == "strict"
    task = draw(tasks)
    n_heads, head_width = draw(positive), draw(positive)
    d_model = max(2, n_heads * head_width)
    merge = draw(st.sampled_from(["concat", "mean"]))
    axial = draw(st.booleans())
    split = draw(st.integers(1, d_model - 1))
    return plain_spec(
        attention__kind=draw(st.sampled_from(["lsh", "local", "full", "full_standard"])),
        attention__n_hashes=draw(positive),
        attention__n_buckets=n_buckets,
        attention__chunk_length=draw(positive),
        attention__causality=causality,
        attention__n_chunks_before=draw(st.integers(1 if strict else 0, 3)),
        attention__n_chunks_after=draw(st.none() | st.integers(0, 0 if strict else 3)),
        attention__duplicates=draw(st.sampled_from(["count", "sum"])),
        attention__seams=draw(st.sampled_from(["masked", "reference"])),
        attention__logit_scale=draw(st.sampled_from(["trax", "sqrt_d"])),
        attention__backend=draw(st.sampled_from(["auto", "reference"])),
        hashing={"_target_": f"reformer.{family}"},
        local__chunk_length=draw(maybe_positive),
        local__n_chunks_before=draw(st.integers(0, 3)),
        model__d_model=d_model,
        model__n_heads=n_heads,
        model__d_head=draw(positive if d_model % n_heads else maybe_positive),
        model__d_ff=draw(maybe_positive),
        model__n_layers=draw(positive),
        model__layers=draw(st.lists(st.sampled_from(["lsh", "local", "full"]), min_size=1, max_size=3)),
        model__residual=draw(st.sampled_from(["plain", "reversible"])),
        model__positions="axial" if axial else "learned",
        model__axial_shape=draw(st.none() | st.just([30, 30])),
        model__axial_dims=draw(st.none() | st.just([split, d_model - split])),
        model__max_length=draw(st.none() | st.just(task["length"] + 1)),
        model__heads_at_once=draw(maybe_positive),
        model__ff_chunk_length=draw(maybe_positive),
        model__loss_chunk_length=draw(maybe_positive),
        model__dropout=draw(small_float),
        model__attention_dropout=draw(small_float),
        model__merge=merge,
        model__tie_weights=draw(st.booleans()) and merge == "mean",
        model__embedding_std=draw(st.floats(1e-6, 10)),
        task=task,
        workload=draw(workloads),
        train__steps=draw(positive),
        train__lr=draw(st.floats(0, 1e30) | positive),
        train__clip=draw(small_float | st.just(0)),
        train__optimizer=draw(st.sampled_from(["adamw", "adam", "sgd"])),
        train__beta1=draw(small_float),
        evaluate__n_hashes=draw(st.lists(positive, max_size=3)),
        evaluate__hash_seeds=draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=3)),
        evaluate__controls=draw(st.lists(st.sampled_from(["full", "random", "knock_out"]), max_size=3)),
        device=draw(st.sampled_from(["cpu", "cuda"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        threads=draw(st.none() | positive),
        seed=draw(st.integers(0, 2**31 - 1)),
        repeat=draw(st.integers(0, 9)),
    )


@given(data=plain_specs())
def test_what_is_encoded_decodes_to_an_equal_spec(data: dict[str, Any]) -> None:
    spec = decode(data)
    through_a_pipe = json.loads(json.dumps(encode(spec), allow_nan=False))
    assert decode(through_a_pipe) == spec
    assert trial_id(through_a_pipe) == trial_id(encode(spec))


@given(data=plain_specs())
def test_every_value_arrives_as_it_was_given(data: dict[str, Any]) -> None:
    encoded = dict(leaves(encode(decode(data))))
    given = dict(leaves(json.loads(json.dumps(data))))
    changed = {path for path, value in given.items() if path in encoded and encoded[path] != value}
    # Only the short names of classes, and "every CPU", become something else.
    assert changed <= {"hashing._target_", "task._target_", "threads"}
    # Keys that are younger than the ids of trials are left out at their defaults.
    assert {path: given[path] for path in given if path not in encoded} == {"train.save_weights": False}


def test_decoding_leaves_its_data_alone() -> None:
    data = plain_spec(threads=None)
    before = copy.deepcopy(data)
    decode(data)
    assert data == before


def test_every_cpu_is_a_number_in_the_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "available_cpus", lambda: 5)
    assert trial_spec(threads=None).threads == 5
    assert trial_spec(threads=3).threads == 3


def test_lists_become_tuples_at_every_depth() -> None:
    spec = trial_spec(model__layers=["local", "lsh"], attention__n_buckets=[2, 4], model__axial_shape=[4, 8])
    assert spec.model.layers == ("local", "lsh")
    assert spec.attention.n_buckets == (2, 4)
    assert spec.model.axial_shape == (4, 8)
    assert spec.evaluate.hash_seeds == (0, 5)
    hash(spec)


def test_one_value_stands_for_a_list_of_one() -> None:
    spec = trial_spec(model__layers="local", evaluate__n_hashes=4)
    assert spec.model.layers == ("local",)
    assert spec.evaluate.n_hashes == (4,)


def test_a_whole_number_does_for_a_real_one() -> None:
    spec = trial_spec(train__lr=1)
    assert type(spec.train.lr) is float
    assert id_of(plain_spec(train__lr=1)) == id_of(plain_spec(train__lr=1.0))


# What is no spec


@pytest.mark.parametrize(
    ("path", "key", "suggestion"),
    [
        ("", "sead", "did you mean seed?"),
        ("", "atention", "did you mean attention?"),
        ("attention", "n_hash", "did you mean attention.n_hashes?"),
        ("task", "n_symbol", "did you mean task.n_symbols?"),
        ("local", "zzz", "known here: chunk_length, n_chunks_before"),
        ("workload", "steps", "known here: nothing"),
        ("workload", "implementation", "it is one of workload=attention or train_step"),
    ],
)
def test_an_unknown_key_is_told_with_its_path_and_a_near_one(path: str, key: str, suggestion: str) -> None:
    data = plain_spec()
    (data[path] if path else data)[key] = 1
    assert complaint(data) == f"{path}{'.' if path else ''}{key}: no such key; {suggestion}"


@pytest.mark.parametrize("key", OUTSIDE_SPEC)
def test_what_changes_no_number_is_no_part_of_a_spec(key: str) -> None:
    assert key not in {field.name for field in fields(TrialSpec)}
    assert complaint({**plain_spec(), key: "x"}).startswith(f"{key}: no such key")


@pytest.mark.parametrize("path", ["train", "train.steps", "task.length", "attention.chunk_length"])
def test_a_missing_key_is_told_with_its_path(path: str) -> None:
    data = plain_spec()
    *groups, key = path.split(".")
    del (data[groups[0]] if groups else data)[key]
    assert complaint(data) == f"{path}: missing; give it a value"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention__n_hashes", "many", '"many": must be an integer'),
        ("attention__n_hashes", 4.0, "4.0: must be an integer"),
        ("attention__n_hashes", True, "true: must be an integer"),
        ("attention__n_hashes", None, "null: must be an integer"),
        ("attention__n_hashes", [1, 2], "[1, 2]: must be an integer"),
        ("attention__n_hashes", {"a": 1}, '{"a": 1}: must be an integer'),
        ("attention__n_hashes", 2**63, f"{2**63}: no integer of 64 bits; use at most {2**63 - 1}"),
        ("train__lr", 2**63, f"{2**63}: no integer of 64 bits; use at most {2**63 - 1}"),
        ("seed", 0.0, "0.0: must be an integer"),
        ("threads", "all", '"all": must be an integer'),
        ("train__lr", "fast", '"fast": must be a number'),
        ("train__lr", True, "true: must be a number"),
        ("train__lr", None, "null: must be a number"),
        ("train__lr", float("nan"), "NaN: must be a number"),
        ("train__lr", float("inf"), "Infinity: must be a number"),
        ("model__tie_weights", 1, "1: must be true or false"),
        ("model__tie_weights", "yes", '"yes": must be true or false'),
        ("device", None, "null: must be a word"),
        ("device", 0, "0: must be a word"),
        ("model__d_ff", "wide", '"wide": must be an integer or null'),
        ("model__d_ff", 64.0, "64.0: must be an integer or null"),
        (
            "attention__n_buckets",
            2.5,
            "2.5: must be an integer or a list of an integer and an integer or null",
        ),
        (
            "attention__n_buckets",
            [4, 4, 4],
            "[4, 4, 4]: must be an integer or a list of an integer and an integer or null",
        ),
        ("model__axial_shape", [4], "[4]: must be a list of an integer and an integer or null"),
        ("model__axial_shape", 4, "4: must be a list of an integer and an integer or null"),
        ("evaluate__n_hashes", [1, "two"], '"two": must be an integer'),
        ("model__layers", ["lsh", 2], "2: must be a word"),
        ("train", 3, "3: must be a group of settings, not a single value"),
        ("train", [3], "[3]: must be a group of settings, not a single value"),
        ("hashing", "random", '"random": must be a group of settings, not a single value'),
    ],
)
def test_a_value_of_the_wrong_type_is_told_with_the_right_one(key: str, value: Any, message: str) -> None:
    assert complaint(plain_spec(**{key: value})) == f"{key.replace('__', '.')}={message}"


def test_a_long_value_is_cut() -> None:
    message = complaint(plain_spec(attention__n_hashes="x" * 500))
    assert len(message) < 120
    assert message.endswith("…: must be an integer")


# Classes


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules that decoding asks for."""
    names: list[str] = []
    real: Callable[..., Any] = importlib.import_module

    def note(name: str, package: str | None = None) -> Any:
        names.append(name)
        return real(name, package)

    monkeypatch.setattr(codec.importlib, "import_module", note)
    return names


@pytest.mark.parametrize("target", ["os.system", "tests.harness.fakes.Fake", "reformer_evil.X", "X", ""])
def test_nothing_outside_the_allowed_packages_is_imported(
    target: str, imported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ALLOW_VARIABLE, raising=False)
    message = complaint(plain_spec(workload={"_target_": target}))
    assert message == (
        f"workload._target_={target!r}: only reformer. and harness. are imported; allow others with the "
        "environment variable HARNESS_ALLOW_TARGETS"
    )
    assert not [name for name in imported if not name.startswith(("reformer", "harness"))]


def test_the_environment_allows_other_packages_by_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = {"_target_": "tests.harness.fakes.Fake", "does": "succeed"}
    monkeypatch.setenv(ALLOW_VARIABLE, "mine.,tests.harness.")
    assert type(trial_spec(workload=fake).workload).__name__ == "Fake"
    for others in ("mine.", "", ","):
        monkeypatch.setenv(ALLOW_VARIABLE, others)
        assert "only reformer. and harness. are imported" in complaint(plain_spec(workload=fake))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, "null: must be the import path of a HashFamily"),
        (3, "3: must be the import path of a HashFamily"),
        ("reformer.Hyperplan", "'reformer.Hyperplan': cannot be imported ("),
        ("reformer.nothing.Hyperplane", "'reformer.nothing.Hyperplane': cannot be imported ("),
        ("reformer.", "'reformer.': cannot be imported ("),
        ("harness.tasks.Copy", "'harness.tasks.Copy': is no HashFamily"),
        ("reformer.lsh_attention", "'reformer.lsh_attention': is no HashFamily"),
        ("reformer.HashFamily", "'reformer.HashFamily': is no HashFamily"),
    ],
)
def test_a_target_that_is_none_is_told(target: Any, message: str) -> None:
    assert complaint(plain_spec(hashing={"_target_": target})).startswith(f"hashing._target_={message}")


def test_a_group_of_classes_without_a_target_is_told() -> None:
    assert complaint(plain_spec(hashing={})).startswith("hashing._target_=null: must be the import path")


def test_a_class_is_built_with_its_settings_and_its_defaults() -> None:
    target = {"_target_": "harness.workloads.train_step.TrainStep"}
    assert trial_spec(workload={**target, "timed_steps": 3}).workload == TrainStep(timed_steps=3)
    assert id_of(plain_spec(workload=target)) == id_of(
        plain_spec(workload={**target, "warmup_steps": 2, "timed_steps": 10})
    )


def test_a_class_is_one_under_all_its_names() -> None:
    names = ("reformer.Random", "reformer.hashing.Random", "reformer.hashing.random.Random")
    specs = [trial_spec(hashing={"_target_": name}) for name in names]
    assert [spec.hashing for spec in specs] == [Random()] * 3
    assert {encode(spec)["hashing"]["_target_"] for spec in specs} == {"reformer.hashing.random.Random"}
    assert trial_spec().hashing == CrossPolytope()


def test_what_a_class_refuses_is_told_as_it_says() -> None:
    target = {"_target_": "harness.workloads.train_step.TrainStep"}
    assert complaint(plain_spec(workload={**target, "timed_steps": 0})).startswith(
        "workload.warmup_steps=2, workload.timed_steps=0"
    )


# Identity


def test_the_id_is_of_the_canonical_json() -> None:
    canonical = '{"a":"\\u00e9","b":[1,2.5,null],"c":{"x":true,"y":0}}'
    expected = hashlib.sha256(canonical.encode()).hexdigest()[:12]
    assert trial_id({"b": [1, 2.5, None], "c": {"y": 0, "x": True}, "a": "é"}) == expected


def test_the_id_does_not_depend_on_the_order_of_keys() -> None:
    data = plain_spec()
    turned = {key: data[key] for key in reversed(data)}
    turned["model"] = {key: data["model"][key] for key in reversed(data["model"])}
    assert id_of(turned) == id_of(data)


def leaves(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of plain data with its dotted path."""
    if not isinstance(data, dict):
        yield path, data
        return
    for key, value in data.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


def test_the_id_depends_on_every_setting() -> None:
    encoded = encode(trial_spec())
    ids = {trial_id(encoded)}
    for path, value in leaves(encoded):
        changed = copy.deepcopy(encoded)
        *groups, key = path.split(".")
        functools.reduce(dict.__getitem__, groups, changed)[key] = [value, "and more"]
        ids.add(trial_id(changed))
    assert len(ids) == 1 + len(list(leaves(encoded)))
    assert all(len(name) == 12 and set(name) <= set("0123456789abcdef") for name in ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention__n_hashes": 3},
        {"model__residual": "reversible"},
        {"hashing": {"_target_": "reformer.Random"}},
        {"task__length": 34},
        {"task": {"_target_": "harness.tasks.Text", "length": 32, "evaluation_tokens": 100}},
        {"workload": {"_target_": "harness.workloads.train_step.TrainStep"}},
        {"evaluate__controls": []},
        {"train__lr": 0.02},
        {"threads": 2},
        {"dtype": "bfloat16"},
        {"seed": 1},
        {"repeat": 1},
    ],
)
def test_another_trial_has_another_id(settings: dict[str, Any]) -> None:
    assert id_of(plain_spec(**settings)) != id_of(plain_spec())
