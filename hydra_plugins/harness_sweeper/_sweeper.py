"""The sweeper: every `harness run` is a sweep of this kind, a single trial is a sweep of one.

It differs from Hydra's own in what it does before anything is launched: the levels of the experiment
and of the command line are merged, every cell is composed and decoded, and trials that are invalid,
duplicate or done already are told apart from those that have to run.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import MissingConfigException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf, flag_override

from harness.environment import code_fingerprint
from harness.errors import UsageError
from harness.plan import PLACEMENT_KEYS, Cell, Placement, Plan, make_plan
from harness.protocol import now
from harness.server import Decoded, process_server
from hydra_plugins.harness_sweeper import _ray, _slurm
from hydra_plugins.harness_sweeper._errors import COMPOSITION_ERRORS, explain

#: A whole value that stands for that of another key, named from the top.
_INTERPOLATION = re.compile(r"\$\{(\w[\w.]*)\}")


@dataclass
class HarnessSweeperConf:
    """`hydra/sweeper=harness`: which cells a preset sweeps, unless the command line says otherwise.

    Args:
        params: keys and their levels, as one would type them; the sweep is their product.
        also: further products of the same kind, run into the same study.
        only: the trials that are meant, by their ids or how these begin; all if there are none.
    """

    _target_: str = "hydra_plugins.harness_sweeper._sweeper.HarnessSweeper"
    params: dict[str, str] = field(default_factory=dict)
    also: list[dict[str, Any]] = field(default_factory=list)
    only: list[str] = field(default_factory=list)


ConfigStore.instance().store(
    group="hydra/sweeper", name="harness", node=HarnessSweeperConf, provider="harness_sweeper"
)


class HarnessSweeper(Sweeper):
    """Plans a sweep over cells and hands what has to run to the launcher."""

    def __init__(
        self,
        params: Mapping[str, str],
        also: Sequence[Mapping[str, Any]] = (),
        only: Sequence[str] = (),
    ) -> None:
        self.only = tuple(only)
        self.products = [
            {key: "null" if levels is None else str(levels) for key, levels in product.items()}
            for product in (params, *also)
        ]
        self.config: DictConfig
        self.hydra_context: HydraContext
        self.launcher: Launcher

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before anything else."""
        self.config = config
        self.hydra_context = hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Plan and launch in one go, as Hydra calls it."""
        return self.launch(self.plan(arguments))

    def plan(self, arguments: Sequence[str], *, check_device: bool = False, forecast: bool = False) -> Plan:
        """Compose, decode and classify every cell.

        Args:
            arguments: the overrides of the command line, Hydra's own excepted.
            check_device: whether a device that is not on this machine makes a cell invalid.
            forecast: whether the plan tells what its trials will cost.

        Raises:
            UsageError: the sweep makes no sense.
            HydraException: no cell can be composed, or a level names an option that does not exist.
        """
        made_at = now()
        products = [self._axes(preset, arguments) for preset in self.products]
        cells = self._cells(products)
        decoded = process_server().decode(
            [{} if cell.config is None else cell.config for cell in cells],
            check_device=check_device,
            forecast=forecast,
        )
        placement = placement_of(self.config)
        plan = make_plan(
            cells,
            [_with_error(cell, result) for cell, result in zip(cells, decoded, strict=True)],
            placement=placement,
            factors=_factors(products),
            code=code_fingerprint(),
            made_at=made_at,
        )
        return plan.narrowed_to(self.only) if self.only else plan

    def launch(self, plan: Plan) -> list[JobReturn]:
        """Run what the plan wants, through whatever launcher is configured."""
        jobs = [
            (
                *trial.overrides,
                f"results_dir={_quoted(str(plan.placement.study.path.parent))}",
                # `null` is the number of CPUs here; a node may have another.
                f"threads={trial.spec['threads']}",
                f"cell={_quoted(job_ticket(plan, trial.trial_id, trial.cell))}",
            )
            for trial in plan.to_run
        ]
        if not jobs:
            return []
        threads = most_threads(plan)
        name = type(self.launcher).__name__
        if name == "SlurmLauncher":
            timeout_s = plan.placement.timeout_s
            return _slurm.launch(self.launcher, jobs, threads=threads, timeout_s=timeout_s)
        if name == "RayLauncher":
            return _ray.launch(self.launcher, jobs, threads=threads)
        return list(self.launcher.launch(jobs, initial_job_idx=0))

    def _axes(self, preset: Mapping[str, str], arguments: Sequence[str]) -> list[_Axis]:
        """The levels of each key: the experiment's, replaced by those of the command line."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        params = parser.parse_overrides([f"{key}={levels}" for key, levels in preset.items()])
        typed = parser.parse_overrides(list(arguments))
        axes = {_name(override): _Axis.of(override, pinned=True) for override in params}
        for override in typed:
            name = _name(override)
            pinned = name in axes and axes[name].pinned
            axes[name] = _Axis.of(override, pinned=pinned)
        for axis in axes.values():
            if axis.swept and axis.key in PLACEMENT_KEYS:
                raise UsageError(
                    f"{axis.key}={','.join(axis.levels)} cannot be swept: it does not change what is measured"
                )
        return list(axes.values())

    def _cells(self, products: Sequence[Sequence[_Axis]]) -> list[Cell]:
        """Every combination of levels of every product, composed as far as it can be.

        Raises:
            HydraException: none can be composed, or one names an option that does not exist.
        """
        composer = Composer(self.hydra_context.config_loader, self.config)
        cells = []
        errors: list[Exception] = []
        combinations = [
            (axes, combination)
            for axes in products
            for combination in itertools.product(*(axis.overrides for axis in axes))
        ]
        for axes, combination in combinations:
            overrides = tuple(_line(override) for override in combination)
            config, error = None, ""
            try:
                config = composer.compose(combination)
            except MissingConfigException:
                raise
            except COMPOSITION_ERRORS as exception:
                errors.append(exception)
                error = explain(
                    exception,
                    loader=self.hydra_context.config_loader,
                    config_name=composer.config_name,
                    overrides=overrides,
                )
            levels = {
                axis.key: _level(override)
                for axis, override in zip(axes, combination, strict=True)
                if axis.swept or axis.pinned
            }
            levels.setdefault("seed", str((config or {}).get("seed", "")))
            cells.append(Cell(overrides=overrides, levels=levels, config=config, error=error))
        if len(errors) == len(cells):
            raise errors[0]
        return cells


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """One key and its levels.

    Args:
        swept: whether it has several; fixed keys have one.
        pinned: whether the experiment sweeps it, so that it belongs to the cell whatever was typed.
    """

    key: str
    overrides: tuple[Override, ...]
    swept: bool
    pinned: bool

    @classmethod
    def of(cls, override: Override, *, pinned: bool) -> _Axis:
        """Read the levels that an override stands for.

        Raises:
            UsageError: it stands for none, or for a continuum.
        """
        if not override.is_sweep_override():
            return cls(key=_name(override), overrides=(override,), swept=False, pinned=pinned)
        parser = OverridesParser.create(config_loader=override.config_loader)
        name = override.get_key_element()
        levels = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else []
        if not levels:
            raise UsageError(f"{override.input_line} has no levels to go through: use commas or range(1,5)")
        parsed = tuple(parser.parse_overrides([f"{name}={level}" for level in levels]))
        return cls(key=_name(override), overrides=parsed, swept=True, pinned=pinned)

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels as typed."""
        return tuple(_level(override) for override in self.overrides)


def _factors(products: Sequence[Sequence[_Axis]]) -> dict[str, tuple[str, ...]]:
    """Every key that has several levels, in one product or over all of them, with its levels as typed."""
    levels: dict[str, dict[str, None]] = {}
    for axes in products:
        for axis in axes:
            if axis.swept or axis.pinned:
                levels.setdefault(axis.key, {}).update(dict.fromkeys(axis.levels))
    swept = {axis.key for axes in products for axis in axes if axis.swept}
    return {key: tuple(found) for key, found in levels.items() if key in swept or len(found) > 1}


class Composer:
    """Composes cells as Hydra would, but the groups only once for each choice of theirs.

    Choosing options of groups is what makes composing slow (some 100 ms). Plain values are then set in plain
    data; whatever is more than that (a key that is added or deleted, a part of a tree, an interpolation) is
    set on a copy of the config by the very function that Hydra uses, in the same order, in milliseconds.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self.config_name = str(config.hydra.job.config_name)
        self._loader: Any = loader
        self._hydra_overrides = list(config.hydra.overrides.hydra)
        self._composed: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}
        self._plain: dict[tuple[str, ...], _Plain] = {}
        self._is_choice: dict[str, bool] = {}
        self._current: tuple[str, ...] | None = None

    def compose(self, overrides: Sequence[Override]) -> dict[str, Any]:
        """The config of one cell as plain data, without the keys that only place it.

        Raises:
            HydraException: a key or an option that does not exist.
            OmegaConfBaseException: a value that cannot be resolved.
        """
        values = [override for override in overrides if not self._chooses(override)]
        choices = tuple(_line(override) for override in overrides if self._chooses(override))
        base = self._base(choices)
        if choices not in self._plain:
            self._plain[choices] = _Plain.of(base)
        patched = self._plain[choices].patched(values)
        if patched is not None:
            return patched
        config = copy.deepcopy(base)
        self._loader._apply_overrides_to_config(values, config)
        return plain_config(config)

    def _chooses(self, override: Override) -> bool:
        """Whether it chooses an option of a group, which is Hydra's own question."""
        line = _line(override)
        if line not in self._is_choice:
            exists: bool = self._loader.repository.group_exists(override.key_or_group)
            self._is_choice[line] = exists and not isinstance(override.value(), dict)
        return self._is_choice[line]

    def _base(self, choices: tuple[str, ...]) -> DictConfig:
        """The config under these options, which is also what ${hydra:...} refers to from here on."""
        if choices not in self._composed:
            composed = self._loader.load_configuration(
                config_name=self.config_name,
                overrides=[*self._hydra_overrides, *choices],
                run_mode=RunMode.RUN,
            )
            self._composed[choices] = (OmegaConf.masked_copy(composed, "hydra"), _without_hydra(composed))
        hydra, config = self._composed[choices]
        if choices != self._current:
            self._current = choices
            HydraConfig.instance().set_config(hydra)
        return config


@dataclass(frozen=True, kw_only=True)
class _Plain:
    """A composed config as plain data that values can be set in.

    Args:
        data: the config, resolved, without the keys that only place a trial.
        mentioned: keys that interpolations in it refer to; None if one of them is more than a key.
    """

    data: dict[str, Any] | None
    mentioned: frozenset[str] | None

    @classmethod
    def of(cls, config: DictConfig) -> _Plain:
        try:
            data = plain_config(config)
        except COMPOSITION_ERRORS:
            data = None  # a value that is missing, until a cell brings it
        raw = OmegaConf.to_container(config, resolve=False)
        assert isinstance(raw, dict)
        texts = [text for key, value in raw.items() if key not in PLACEMENT_KEYS for text in _texts(value)]
        found = [_INTERPOLATION.fullmatch(text) for text in texts if "$" in text]
        mentioned = None if None in found else frozenset(match[1] for match in found if match is not None)
        return cls(data=data, mentioned=mentioned)

    def patched(self, overrides: Sequence[Override]) -> dict[str, Any] | None:
        """A copy with these values; None if they are more than values of keys that are there."""
        if self.data is None or self.mentioned is None:
            return None
        data = dict(self.data)
        for override in overrides:
            key, value = override.key_or_group, override.value()
            if override.type is not OverrideType.CHANGE or override.package is not None:
                return None
            if not _is_plain(value) or any(_meet(key, other) for other in self.mentioned):
                return None
            if key in PLACEMENT_KEYS:
                continue
            path = key.split(".")
            place = data
            for part in path[:-1]:
                if not isinstance(place.get(part), dict):
                    return None
                place[part] = dict(place[part])
                place = place[part]
            if path[-1] not in place or isinstance(place[path[-1]], dict):
                return None
            place[path[-1]] = value
        return data


def _is_plain(value: Any) -> bool:
    """Whether OmegaConf would take the value as it is."""
    if isinstance(value, list):
        return all(not isinstance(entry, list) and _is_plain(entry) for entry in value)
    if isinstance(value, str):
        return "$" not in value and value != "???"
    return value is None or isinstance(value, (bool, int, float))


def _meet(key: str, other: str) -> bool:
    """Whether one of two keys is the other one or a part of it."""
    return f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _without_hydra(config: DictConfig) -> DictConfig:
    if "hydra" not in config:
        return config
    config = copy.copy(config)
    with flag_override(config, ["struct", "readonly"], [False, False]):
        del config["hydra"]
    return config


def most_threads(plan: Plan) -> int:
    """Threads of the trial that has most of those to run."""
    return max((int(trial.spec.get("threads", 1)) for trial in plan.to_run), default=1)


def placement_of(config: DictConfig) -> Placement:
    """Where and how the trials of a composed config run.

    Raises:
        UsageError: a value that cannot be.
    """
    return Placement.of({key: config.get(key) for key in PLACEMENT_KEYS})


def plain_config(config: DictConfig) -> dict[str, Any]:
    """A composed config, resolved, as the plain data that is decoded into a spec."""
    plain = OmegaConf.to_container(_without_hydra(config), resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key not in (*PLACEMENT_KEYS, "hydra")}


def job_ticket(plan: Plan, trial_id: str, cell: Mapping[str, str]) -> str:
    """What a job is told about its trial besides the config: who it should turn out to be."""
    ticket = {"trial_id": trial_id, "cell": dict(cell), "planned_at": plan.made_at}
    # No interpolation may be seen in it, whatever was typed.
    return json.dumps(ticket).replace("$", "\\u0024")


def _with_error(cell: Cell, result: Decoded) -> Decoded:
    """A cell that could not be composed is invalid for that reason, under an id of its own."""
    if cell.config is not None:
        return result
    digest = hashlib.sha256(json.dumps(cell.overrides).encode()).hexdigest()
    return Decoded(trial_id=digest[:12], error=cell.error)


def _name(override: Override) -> str:
    """What an override sets, however it is spelt (`key`, `+key`, `++key`)."""
    return override.get_key_element().lstrip("+")


def _level(override: Override) -> str:
    return str(override.get_value_element_as_str())


def _line(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line


def _quoted(text: str) -> str:
    return QuotedString(text=text, quote=Quote.single).with_quotes()
