"""The shipped configuration: all of it composes, decodes and names what there is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from hydra.types import RunMode

import harness.tasks
import harness.workloads
import reformer.hashing
from harness import worker
from harness.cli import _hydra, _parse, _planned
from harness.codec import OUTSIDE_SPEC, TARGET, decode, encode
from harness.gates.margins import read_margins
from harness.metrics.catalogue import KNOWN
from harness.paths import conf_dir
from harness.plan import Plan
from harness.record import trial_id
from harness.server import Decoded, ForkServer
from harness.spec import TrialSpec
from harness.tasks import Task
from harness.workloads import Workload
from harness.workloads.evaluate import Evaluate
from hydra_plugins.harness_sweeper import plain_config
from hydra_plugins.harness_sweeper._sweeper import _without_hydra
from reformer import HashFamily

CONF = conf_dir()
FILES = sorted(CONF.rglob("*.yaml"))
#: Groups that are no part of a trial.
APART = ("experiment", "gate", "hydra")
OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in FILES
    if path.parent != CONF and path.relative_to(CONF).parts[0] not in APART
]
EXPERIMENTS = [path.stem for path in FILES if path.parent == CONF / "experiment"]
#: What implements an interface, and the group that names it.
INTERFACES: list[tuple[type, ModuleType, str]] = [
    (HashFamily, reformer.hashing, "hashing"),
    (Task, harness.tasks, "task"),
    (Workload, harness.workloads, "workload"),
]
GROUPS = [group for _, _, group in INTERFACES]

Compose = Callable[..., dict[str, Any]]


def name_of(path: Path) -> str:
    return path.relative_to(CONF).as_posix()


#: What commands build themselves: `harness evaluate` names the weights.
INTERNAL = {Evaluate}


@pytest.fixture(scope="module")
def compose_all() -> Iterator[Callable[..., Any]]:
    """Composes overrides as Hydra does, Hydra's own part included."""
    with _hydra(_parse([], command="run")) as hydra:
        yield lambda *overrides: hydra.compose_config("config", list(overrides), RunMode.RUN)


@pytest.fixture
def compose(compose_all: Callable[..., Any]) -> Compose:
    """Composes overrides to the plain data of a trial."""
    return lambda *overrides: plain_config(_without_hydra(compose_all(*overrides)))


def load(path: Path) -> dict[str, Any]:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def class_of(target: str) -> Any:
    module, _, name = target.rpartition(".")
    return getattr(importlib.import_module(module), name)


def targets(group: str) -> dict[str, Any]:
    """The class that each option of a group names."""
    return {path.stem: class_of(load(path)[TARGET]) for path in sorted((CONF / group).glob("*.yaml"))}


def implementations(base: type, package: ModuleType) -> set[type]:
    """The concrete classes of a package, all of its modules imported."""
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)

    def below(kind: type) -> Iterator[type]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return {
        kind
        for kind in below(base)
        if kind.__module__.startswith(f"{package.__name__}.") and not inspect.isabstract(kind)
    }


# One trial


def test_a_composed_trial_is_its_spec_and_what_changes_no_number(compose_all: Callable[..., Any]) -> None:
    keys = {str(key) for key in compose_all()}
    assert keys == {field.name for field in fields(TrialSpec)} | set(OUTSIDE_SPEC)


def test_what_changes_no_number_does_not_change_the_id(compose: Compose) -> None:
    placed = compose(
        "study=mine", "results_dir=/somewhere", "timeout_s=1", "memory_limit_gib=2", "rerun=all", "cell=x"
    )
    assert trial_id(encode(decode(placed))) == trial_id(encode(decode(compose())))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_every_group_is_a_valid_trial(option: str, compose: Compose) -> None:
    group, _, name = option.partition("=")
    # An implementation is one of what is measured by itself.
    spec = decode(compose(option, *(["workload=attention"] if group == "implementation" else [])))
    if group in GROUPS:
        assert type(getattr(spec, group)) is targets(group)[name]


@pytest.mark.parametrize("kind", ["lsh", "local", "full", "full_standard"])
def test_an_attention_is_that_of_every_layer_unless_layers_are_given(kind: str, compose: Compose) -> None:
    spec = decode(compose(f"attention={kind}"))
    assert (spec.attention.kind, spec.model.layers) == (kind, (kind,))
    mixed = decode(compose(f"attention={kind}", "model.layers=[local,lsh]"))
    assert mixed.model.layers == ("local", "lsh")


# Experiments


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Plan]]:
    """Plans what is typed behind `harness plan`; decodes in this process, which saves starting another."""

    def decode_here(
        self: ForkServer, configs: list[Mapping[str, Any]], *, check_device: bool, forecast: bool
    ) -> list[Decoded]:
        return [Decoded(**result) for result in worker._decode_all(configs, check_device)]

    monkeypatch.setattr(ForkServer, "decode", decode_here)
    monkeypatch.chdir(tmp_path)

    def plans(*overrides: str) -> list[Plan]:
        with _planned(_parse(overrides, command="plan"), dry=True) as sweeps:
            return [sweep.plan for sweep in sweeps]

    return plans


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_trial_of_every_experiment_is_valid(name: str, plan: Callable[..., list[Plan]]) -> None:
    (one,) = plan(f"experiment={name}")
    assert {trial.reason for trial in one.invalid} == set()
    assert one.duplicates == 0
    assert (one.placement.experiment, one.placement.study.name) == (name, name)
    assert one.factors or len(one.trials) == 1
    assert all(len(levels) > 1 for levels in one.factors.values())
    assert {trial.state for trial in one.trials} == {"new"}


# Classes


@pytest.mark.parametrize(("base", "package", "group"), INTERFACES, ids=GROUPS)
def test_every_class_has_an_option_and_every_option_a_class(
    base: type, package: ModuleType, group: str
) -> None:
    named = targets(group)
    assert set(named.values()) == implementations(base, package) - INTERNAL


@pytest.mark.parametrize("group", GROUPS)
def test_an_option_lists_all_that_its_class_can_be_given(group: str) -> None:
    # A key that is not there cannot be overridden as `group.key=value`.
    for name, kind in targets(group).items():
        keys = set(load(CONF / group / f"{name}.yaml"))
        assert keys == {TARGET, *(field.name for field in fields(kind))}, name


# Files


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @")]
    assert lines[0].startswith("# ")


@pytest.mark.parametrize("path", sorted((CONF / "gate").glob("*.yaml")), ids=name_of)
def test_every_file_of_margins_is_about_known_metrics(path: Path) -> None:
    margins = read_margins(path)
    assert margins.metrics
    assert set(margins.metrics) <= set(KNOWN)
