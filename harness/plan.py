"""What a sweep would do: which trials there are, in which state, and in which order they run.

The composing is the sweeper's; here a sweep is a list of cells with their plain configs. Nothing is run
and nothing is written.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.factors import REPLICATES
from harness.record import FAILED_STATUSES, RecordError
from harness.server import Decoded
from harness.store import Study, study_at

#: States a trial can be in before the sweep runs, in the order they are listed.
STATES = ("invalid", "failed", "stale", "new", "done")
RERUN = ("none", "failed", "stale", "all")
#: Whether timed trials of this machine take turns on a device, or run whenever they can.
TIMING = ("exclusive", "shared")

#: Keys that place a trial but do not change its numbers; they cannot be swept.
PLACEMENT_KEYS = (
    "study",
    "results_dir",
    "experiment",
    "rerun",
    "timeout_s",
    "memory_limit_gib",
    "timing",
    "retries",
    "cell",
    "gate",
)

#: Keys whose levels are what is compared, moment by moment, where all others are equal.
TAKING_TURNS = ("implementation", "workload.implementation")

_SHUFFLE_SEED = 20


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how trials run; none of it changes a number.

    Args:
        rerun: which recorded trials run again: `none`, `failed`, `stale` or `all`.
        timeout_s: seconds after which a trial is ended; None never.
        memory_limit_gib: what a trial on the CPU may take; None for no limit.
        timing: `exclusive` lets a timed trial wait until no other one of this machine is on its device.
        retries: how often a trial is run again that somebody else killed.
    """

    study: Study
    experiment: str
    rerun: str
    timeout_s: float | None
    memory_limit_gib: float | None
    timing: str = "exclusive"
    retries: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Placement:
        """Read the placement keys of a composed config.

        Raises:
            UsageError: a value that cannot be.
        """
        rerun = _word("rerun", settings["rerun"])
        if rerun not in RERUN:
            raise UsageError(f"rerun={rerun} is none of {', '.join(RERUN)}")
        timing = _word("timing", settings["timing"])
        if timing not in TIMING:
            raise UsageError(f"timing={timing} is none of {', '.join(TIMING)}")
        results_dir = Path.cwd() / _word("results_dir", settings["results_dir"])
        if results_dir.exists() and not results_dir.is_dir():
            raise UsageError(f"results_dir={settings['results_dir']}: it is a file, not a folder")
        return cls(
            study=study_at(results_dir, _word("study", settings["study"])),
            experiment=_word("experiment", settings["experiment"]),
            rerun=rerun,
            timeout_s=_limit("timeout_s", settings["timeout_s"]),
            memory_limit_gib=_limit("memory_limit_gib", settings["memory_limit_gib"]),
            timing=timing,
            retries=_times("retries", settings["retries"]),
        )


def _word(key: str, value: Any) -> str:
    """A name, also one made of digits that YAML takes for a number."""
    if value in (None, "") or not isinstance(value, (str, int, float)):
        raise UsageError(f"{key}={'null' if value is None else value}: it must be a word")
    return str(value)


def _limit(key: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UsageError(f"{key}={value}: it must be a number above 0, or null for no limit")
    return float(value)


def _times(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UsageError(f"{key}={value}: it must be a whole number, 0 or more")
    return value


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of levels, composed.

    Args:
        overrides: the whole command line of this trial, as Hydra takes it.
        levels: swept keys with the levels as typed, and the seed.
        config: the composed config as plain data, without placement keys; None if it cannot be composed.
        error: why not.
    """

    overrides: tuple[str, ...]
    levels: Mapping[str, str]
    config: Mapping[str, Any] | None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """One distinct trial of a sweep.

    Args:
        state: one of `STATES`.
        reason: what is wrong with an invalid one, or how the recorded one ended.
        spec: the encoded spec; the raw config where the trial is invalid.
        block: trials of one block (one seed, one repeat) run together, in one measuring process.
        backend: what will compute the attention; empty where there is one way only.
        forecast: what it will cost, as far as that was asked for and is known (see `harness.forecast`).
    """

    trial_id: str
    state: str
    reason: str
    cell: Mapping[str, str]
    overrides: tuple[str, ...]
    spec: Mapping[str, Any]
    block: str
    wanted: bool
    backend: str = ""
    forecast: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A sweep, decided.

    Args:
        trials: every distinct trial, in the order of the cells.
        duplicates: how many cells came to a trial that another cell already is.
        factors: swept keys and their levels as typed.
        code: the fingerprint of the measured code that a new record will carry.
        made_at: when (ISO 8601, UTC).
    """

    placement: Placement
    trials: tuple[PlannedTrial, ...]
    duplicates: int
    factors: Mapping[str, tuple[str, ...]]
    code: str
    made_at: str

    @property
    def single(self) -> bool:
        """Whether nothing is swept."""
        return not self.factors and len(self.trials) == 1

    @property
    def invalid(self) -> tuple[PlannedTrial, ...]:
        return tuple(trial for trial in self.trials if trial.state == "invalid")

    @property
    def to_run(self) -> tuple[PlannedTrial, ...]:
        """What has to run, in randomised complete blocks."""
        return in_blocks(trial for trial in self.trials if trial.wanted)

    def narrowed_to(self, ids: Sequence[str]) -> Plan:
        """The plan of the trials whose ids begin so.

        Raises:
            UsageError: no trial of the sweep has such an id.
        """
        for start in ids:
            if not any(trial.trial_id.startswith(start) for trial in self.trials):
                raise UsageError(f"hydra.sweeper.only: no trial of this sweep has the id {start}")
        trials = tuple(trial for trial in self.trials if trial.trial_id.startswith(tuple(ids)))
        return replace(self, trials=trials, duplicates=0)

    def counts(self) -> dict[str, int]:
        """How many trials are in each state."""
        return {state: sum(trial.state == state for trial in self.trials) for state in STATES}


def make_plan(
    cells: Sequence[Cell],
    decoded: Sequence[Decoded],
    *,
    placement: Placement,
    factors: Mapping[str, tuple[str, ...]],
    code: str,
    made_at: str,
) -> Plan:
    """Decide what to do with each cell.

    Args:
        decoded: what became of each cell's config, in the order of the cells.
    """
    trials: dict[str, PlannedTrial] = {}
    for cell, result in zip(cells, decoded, strict=True):
        if result.trial_id not in trials:
            trials[result.trial_id] = _planned(cell, result, placement=placement, code=code)
    return Plan(
        placement=placement,
        trials=tuple(trials.values()),
        duplicates=len(cells) - len(trials),
        factors=factors,
        code=code,
        made_at=made_at,
    )


def _planned(cell: Cell, result: Decoded, *, placement: Placement, code: str) -> PlannedTrial:
    if result.spec is None:
        found = Found(state="invalid", reason=result.error)
    else:
        found = look_up(placement.study, result.trial_id, code=code)
    return PlannedTrial(
        trial_id=result.trial_id,
        state=found.state,
        reason=found.reason,
        cell=cell.levels,
        overrides=cell.overrides,
        spec=result.spec or cell.config or {},
        block=block_of(cell.levels),
        wanted=found.wanted(placement.rerun),
        backend=result.backend,
        forecast=result.forecast,
    )


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a study says about a trial.

    Args:
        failed: whether the record that is there ended in error or was killed, whatever its code.
    """

    state: str
    reason: str = ""
    failed: bool = False

    def wanted(self, rerun: str) -> bool:
        """Whether the trial has to run."""
        if self.state in ("new", "invalid"):
            return self.state == "new"
        return rerun == "all" or (rerun == "failed" and self.failed) or rerun == self.state == "stale"


def look_up(study: Study, trial_id: str, *, code: str) -> Found:
    """The state of a valid trial."""
    try:
        record = study.summary(trial_id)
    except RecordError as error:
        return Found(state="new", reason=f"its record cannot be read: {error}")
    if record is None:
        return Found(state="new")
    failed = record.status in FAILED_STATUSES
    ending = f"{record.status}: {record.message}" if record.message else record.status
    if record.code != code:
        reason = f"{ending} (measured with other code, {record.code or 'unknown'})"
        return Found(state="stale", reason=reason, failed=failed)
    return Found(state="failed" if failed else "done", reason=ending, failed=failed)


def block_of(cell: Mapping[str, str]) -> str:
    """Which replicate a cell belongs to."""
    return " ".join(f"{key}={cell[key]}" for key in REPLICATES if key in cell)


def in_blocks(trials: Iterable[PlannedTrial]) -> tuple[PlannedTrial, ...]:
    """Block after block, each in an order of its own that is the same every time.

    Drift of the machine then falls on all cells of a block alike, and a sweep that is cut short has
    whole replicates. Trials that differ in the implementation alone follow each other, in any order.
    """
    blocks: dict[str, list[PlannedTrial]] = {}
    for trial in trials:
        blocks.setdefault(trial.block, []).append(trial)
    ordered: list[PlannedTrial] = []
    for block, members in blocks.items():
        draw = random.Random(f"{_SHUFFLE_SEED} {block}")
        members.sort(key=lambda trial: trial.trial_id)
        turns: dict[tuple[tuple[str, str], ...], list[PlannedTrial]] = {}
        for trial in members:
            rest = tuple(item for item in trial.cell.items() if item[0] not in TAKING_TURNS)
            turns.setdefault(rest, []).append(trial)
        rounds = list(turns.values())
        draw.shuffle(rounds)
        for taking_turns in rounds:
            draw.shuffle(taking_turns)
            ordered += taking_turns
    return tuple(ordered)


def study_info(plan: Plan, *, command: str, versions: Mapping[str, str]) -> dict[str, Any]:
    """What `study.json` says once this sweep belongs to the study: levels of both, merged."""
    info = plan.placement.study.read_info()
    factors = {key: list(levels) for key, levels in info.get("factors", {}).items()}
    for key, levels in plan.factors.items():
        known = factors.setdefault(key, [])
        known.extend(level for level in levels if level not in known)
    overrides = dict(info.get("overrides", {}))
    overrides.update({trial.trial_id: list(trial.overrides) for trial in plan.trials})
    return {
        "name": plan.placement.study.name,
        "experiment": plan.placement.experiment,
        "command": command,
        "factors": factors,
        "created": info.get("created", plan.made_at),
        "versions": dict(versions),
        "planned": [trial.trial_id for trial in plan.trials],
        "overrides": overrides,
    }


def spec_lines(plan: Plan) -> str:
    """The valid trials as JSON lines, each of them what `python -m harness.worker` takes."""
    lines = [
        json.dumps(
            {
                "trial_id": trial.trial_id,
                "experiment": plan.placement.experiment,
                "cell": dict(trial.cell),
                "spec": trial.spec,
            }
        )
        for trial in plan.trials
        if trial.state != "invalid"
    ]
    return "".join(f"{line}\n" for line in lines)
