"""The sweeper: cells as Hydra itself would compose them, experiments merged with what is typed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, MissingConfigException
from hydra.types import HydraContext, RunMode
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from harness.cli import _hydra, _parse
from harness.errors import UsageError
from harness.plan import Placement, Plan
from harness.store import Study
from hydra_plugins.harness_sweeper import HarnessSweeper, plain_config
from hydra_plugins.harness_sweeper._sweeper import (
    Composer,
    _Plain,
    _quoted,
    _without_hydra,
    job_ticket,
)
from tests.harness.conftest import FAKE_CONF, Shell


@pytest.fixture(scope="module")
def hydra() -> Iterator[Hydra]:
    with _hydra(_parse(["-cd", str(FAKE_CONF)], command="run")) as one:
        yield one


@pytest.fixture(scope="module")
def composer(hydra: Hydra) -> Composer:
    """One for all cells of the tests, as one sweep has it."""
    master = hydra.compose_config("config", [], RunMode.MULTIRUN)
    return Composer(hydra.config_loader, master)


def by_hydra(hydra: Hydra, overrides: Sequence[str]) -> dict[str, Any]:
    return plain_config(_without_hydra(hydra.compose_config("config", list(overrides), RunMode.RUN)))


def by_us(composer: Composer, overrides: Sequence[str]) -> dict[str, Any]:
    return composer.compose(OverridesParser.create().parse_overrides(list(overrides)))


LEVELS = {
    "attention": ["lsh", "local", "full", "full_standard"],
    "hashing": ["cross_polytope", "hyperplane", "random"],
    "task": ["copy", "text"],
    "workload": ["train", "fake"],
    "attention.n_hashes": ["1", "8"],
    "attention.n_buckets": ["null", "32", "[4,8]"],
    "attention.kind": ["full"],
    "model.residual": ["plain", "reversible"],
    "model.layers": ["[local,lsh]", "local", "'${attention.kind}'"],
    "model": ["small", "{d_model: 32, n_heads: 2}"],
    "train.lr": ["1e-3", "0.01", "${train.weight_decay}"],
    "task.length": ["64", "${local.n_chunks_before}"],
    "evaluate.n_hashes": ["[]", "[1,2]"],
    "seed": ["0", "3"],
    "study": ["mine", "'a b'"],
    "+extra.key": ["1", "{a: {b: 2}}"],
    "++train.lr": ["2"],
    "~train.clip": [""],
    "threads": ["1", "null"],
}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    keys = draw(st.lists(st.sampled_from(list(LEVELS)), unique=True, max_size=8))
    lines = [f"{key}={draw(st.sampled_from(LEVELS[key]))}" for key in keys]
    return [line.rstrip("=") if line.startswith("~") else line for line in lines]


@settings(max_examples=60)
@given(command_lines())
def test_a_patched_cell_is_what_hydra_composes(
    hydra: Hydra, composer: Composer, overrides: list[str]
) -> None:
    assert by_us(composer, overrides) == by_hydra(hydra, overrides)


def test_cells_do_not_leak_into_each_other(hydra: Hydra, composer: Composer) -> None:
    for overrides in (
        ["seed=3", "+extra.key=1", "model.layers=[local]"],
        ["task=text", "~train.clip"],
        ["seed=4"],
        ["task=copy", "attention=full"],
        [],
    ):
        assert by_us(composer, overrides) == by_hydra(hydra, overrides)


@pytest.mark.parametrize(
    ("config", "typed"),
    [
        ({"a": {"b": 1, "c": "${.b}"}}, "a.b=2"),
        ({"a": {"b": 1}, "d": {"c": "${..a.b}"}}, "a.b=2"),
        ({"a": 1, "b": "${a}"}, "a=2"),
        ({"a": {"b": 1}, "c": "${a}"}, "a.b=2"),
        ({"a": 1, "b": "x ${a}"}, "a=2"),
        ({"study": "one", "b": "${study}"}, "study=two"),
        ({"a": 1}, "a=${b}"),
        ({"a": {"b": 1}}, "a=2"),
        ({"a": [1, 2]}, "a.0=2"),
        ({"a": 1}, "b=2"),
        ({"a": "???"}, "a=2"),
    ],
)
def test_what_is_more_than_a_plain_value_is_left_to_hydra(config: dict[str, Any], typed: str) -> None:
    plain = _Plain.of(OmegaConf.create(config))
    assert plain.patched(OverridesParser.create().parse_overrides([typed])) is None


def test_a_plain_value_is_set_on_a_copy() -> None:
    plain = _Plain.of(OmegaConf.create({"a": {"b": 1, "c": "${d}"}, "d": [1], "study": "one"}))
    typed = OverridesParser.create().parse_overrides(["a.b=[2,x]", "study=two"])
    assert plain.patched(typed) == {"a": {"b": [2, "x"], "c": [1]}, "d": [1]}
    assert plain.patched([]) == {"a": {"b": 1, "c": [1]}, "d": [1]}


def test_an_unknown_key_is_as_unknown_as_to_hydra(composer: Composer) -> None:
    with pytest.raises(ConfigCompositionException):
        by_us(composer, ["train.lrr=1"])


# Planning


def plan_of(hydra: Hydra, folder: Path, *typed: str) -> Plan:
    overrides = [f"results_dir={folder}", *typed]
    config = hydra.compose_config("config", overrides, RunMode.MULTIRUN)
    preset = config.hydra.sweeper
    sweeper = HarnessSweeper(params=dict(preset.params), also=[dict(one) for one in preset.also])
    context = HydraContext(config_loader=hydra.config_loader, callbacks=None)  # type: ignore[arg-type]
    sweeper.setup(hydra_context=context, task_function=print, config=config)
    return sweeper.plan(overrides)


def cells(plan: Plan) -> list[dict[str, str]]:
    return [dict(trial.cell) for trial in plan.trials]


def test_an_experiment_brings_its_own_sweep(hydra: Hydra, tmp_path: Path) -> None:
    plan = plan_of(hydra, tmp_path, "experiment=fake_sweep")
    assert plan.factors == {"attention.n_hashes": ("1", "2"), "model.residual": ("plain", "reversible")}
    assert cells(plan)[0] == {"attention.n_hashes": "1", "model.residual": "plain", "seed": "0"}
    assert len(plan.trials) == 4
    assert (plan.placement.study.name, plan.placement.experiment) == ("fake_sweep", "fake_sweep")


def test_what_is_typed_replaces_the_levels_of_that_key(hydra: Hydra, tmp_path: Path) -> None:
    plan = plan_of(hydra, tmp_path, "experiment=fake_sweep", "attention.n_hashes=4,8,16", "seed=0,1")
    assert plan.factors["attention.n_hashes"] == ("4", "8", "16")
    assert len(plan.trials) == 3 * 2 * 2


def test_a_key_of_the_experiment_stays_in_the_cell_when_one_level_is_typed(
    hydra: Hydra, tmp_path: Path
) -> None:
    plan = plan_of(hydra, tmp_path, "experiment=fake_sweep", "attention.n_hashes=4", "train.steps=7")
    assert list(plan.factors) == ["model.residual"]
    assert cells(plan)[0] == {"attention.n_hashes": "4", "model.residual": "plain", "seed": "0"}
    assert plan.trials[0].spec["train"]["steps"] == 7


def test_an_experiment_can_sweep_several_products(hydra: Hydra, tmp_path: Path) -> None:
    plan = plan_of(hydra, tmp_path, "experiment=fake_union")
    assert [(cell["task"], cell["attention.n_hashes"]) for cell in cells(plan)] == [
        ("copy", "1"), ("copy", "2"), ("text", "2"), ("text", "8")
    ]  # fmt: skip
    assert plan.factors == {
        "task": ("copy", "text"),
        "task.length": ("32", "64"),
        "attention.n_hashes": ("1", "2", "8"),
    }
    assert [trial.spec["task"]["length"] for trial in plan.trials] == [32, 32, 64, 64]
    assert plan.trials[2].spec["model"]["axial_shape"] is None


def test_what_is_typed_replaces_the_levels_in_every_product(hydra: Hydra, tmp_path: Path) -> None:
    plan = plan_of(hydra, tmp_path, "experiment=fake_union", "attention.n_hashes=4", "seed=0,1")
    assert [(cell["task"], cell["seed"]) for cell in cells(plan)] == [
        ("copy", "0"), ("copy", "1"), ("text", "0"), ("text", "1")
    ]  # fmt: skip
    assert {cell["attention.n_hashes"] for cell in cells(plan)} == {"4"}


def test_products_that_meet_run_a_trial_once(hydra: Hydra, tmp_path: Path) -> None:
    plan = plan_of(hydra, tmp_path, "experiment=fake_union", "task=text", "task.length=64")
    assert [cell["attention.n_hashes"] for cell in cells(plan)] == ["1", "2", "8"]
    assert plan.duplicates == 1


def test_ranges_choices_and_globs_are_levels(hydra: Hydra, tmp_path: Path) -> None:
    plan = plan_of(
        hydra, tmp_path, "seed=range(0,3)", "hashing=glob(*,exclude=*_*)", "train.lr=choice(1e-3,2)"
    )
    assert plan.factors["seed"] == ("0", "1", "2")
    assert plan.factors["hashing"] == ("codeword", "hyperplane", "random", "syndrome")
    assert plan.factors["train.lr"] == ("0.001", "2")


@pytest.mark.parametrize("typed", ["train.lr=interval(0,1)", "seed=range(1,1)"])
def test_a_sweep_without_levels_is_refused(typed: str, hydra: Hydra, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no levels to go through"):
        plan_of(hydra, tmp_path, typed)


@pytest.mark.parametrize("typed", ["study=a,b", "timeout_s=1,2", "rerun=none,all"])
def test_what_changes_no_number_cannot_be_swept(typed: str, hydra: Hydra, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be swept"):
        plan_of(hydra, tmp_path, typed)


def test_levels_that_come_to_the_same_trial_run_once(hydra: Hydra, tmp_path: Path) -> None:
    plan = plan_of(hydra, tmp_path, "train.lr=1e-3,0.001,1.0e-3")
    assert (len(plan.trials), plan.duplicates) == (1, 2)


def test_a_cell_that_cannot_be_composed_is_invalid_and_the_others_are_not(
    hydra: Hydra, tmp_path: Path
) -> None:
    plan = plan_of(hydra, tmp_path, "task=copy,text", "task.n_symbols=10")
    assert [trial.state for trial in plan.trials] == ["new", "invalid"]
    assert "unknown key 'task.n_symbols'" in plan.trials[1].reason


def test_an_option_that_does_not_exist_is_never_just_a_cell(hydra: Hydra, tmp_path: Path) -> None:
    with pytest.raises(MissingConfigException):
        plan_of(hydra, tmp_path, "task=copy,cpoy")


@given(st.dictionaries(st.text(min_size=1), st.text()))
def test_a_ticket_reaches_the_job_whatever_is_in_it(cell: dict[str, str]) -> None:
    place = Placement(
        study=Study(Path("x")), experiment="x", rerun="none", timeout_s=None, memory_limit_gib=None
    )
    plan = Plan(placement=place, trials=(), duplicates=0, factors={}, code="", made_at="now")
    ticket = job_ticket(plan, "abc", cell)
    (override,) = OverridesParser.create().parse_overrides([f"cell={_quoted(ticket)}"])
    assert "${" not in ticket
    assert json.loads(str(override.value())) == {"trial_id": "abc", "cell": cell, "planned_at": "now"}


def test_odd_levels_and_places_survive_the_way_to_the_job(shell: Shell) -> None:
    odd = shell.folder / "it's $a {place}, [here]"
    result = shell.fake(
        "run",
        "-m",
        f"results_dir='{str(odd).replace(chr(39), chr(92) + chr(39))}'",
        "seed=0,1",
        "threads=1",
    )
    assert result.code == 0, result.err
    records, _ = Study(odd / "default").scan()
    assert [record.outcome.status for record in records] == ["ok", "ok"]
