"""One side of a comparison: what a gate needs of each trial, from a study or from a saved baseline."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from harness import metrics
from harness.factors import REPLICATES, Level, flatten, level_text
from harness.metrics.quality import quality_of
from harness.record import TrialRecord

#: Where these agree, bytes and counts are exact run after run.
FINGERPRINT = ("torch", "threads", "cpu_capability", "device")
#: Where these agree too, times can be compared at all.
TIMING_FINGERPRINT = ("cpu_model", "device_name")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial, as far as a gate looks at it.

    Args:
        cell: swept keys and levels as typed, without seed and repeat.
        replicate: its seed and repeat, `seed 0`.
        scored: tokens behind the accuracy.
        settings: the spec by dotted keys.
    """

    experiment: str
    cell: Mapping[str, str]
    replicate: str
    outcome: str
    code: str
    quality: str
    metrics: Mapping[str, float]
    scored: float = 0.0
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Level] = field(default_factory=dict)

    @functools.cached_property
    def key(self) -> str:
        """What both sides call this trial's cell."""
        return json.dumps([self.experiment, self.cell], sort_keys=True)


def trial_of(record: TrialRecord) -> Trial:
    """The gate's view of a record."""
    settings = flatten(record.spec)
    cell = {str(key): level_text(level) for key, level in flatten(record.cell).items()}
    replicates = [(name, level_text(settings.get(name, cell.get(name, 0)))) for name in REPLICATES]
    known = {**{key: record.environment.get(key) for key in (*FINGERPRINT, *TIMING_FINGERPRINT)}}
    known |= {key: settings[key] for key in ("device", "threads") if key in settings}
    return Trial(
        experiment=record.experiment,
        cell={key: level for key, level in sorted(cell.items()) if key not in REPLICATES},
        replicate=" ".join(f"{name} {level}" for name, level in replicates if name == "seed" or level != "0"),
        outcome=record.outcome.status,
        code=record.code,
        quality=quality_of(record),
        metrics={name: value for name, value in metrics.columns(record).items() if "@" not in name},
        scored=sum(record.values("scored")),
        fingerprint={key: level_text(value) for key, value in known.items() if value is not None},
        settings={key: value for key, value in settings.items() if key not in REPLICATES},
    )


def cells(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Trials by cell, replicates together, in a fixed order."""
    found: dict[str, list[Trial]] = {}
    for trial in sorted(trials, key=lambda trial: (trial.key, trial.replicate)):
        found.setdefault(trial.key, []).append(trial)
    return found
