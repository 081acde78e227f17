"""How long planned trials will take: as long as trials like them, or as their operations need here."""

from __future__ import annotations

import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from harness.factors import REPLICATES
from harness.plan import Plan, PlannedTrial
from harness.record import TrialRecord
from harness.store import Study, studies

#: Records that are looked at, at most: more of them would not tell more.
_MOST_RECORDS = 400


def durations(plan: Plan) -> dict[str, float]:
    """Seconds that each trial of a plan is expected to take, as far as anything tells, by its id.

    Told by records of the same setting under any seed; else by the operations that the cost model counts, at
    the median rate of the records on that device with so many threads. Records are those of the study, or, if
    it has none, of the studies beside it.
    """
    records = list(_records(plan.placement.study))
    alike: dict[str, list[float]] = defaultdict(list)
    rates: dict[tuple[Any, Any], list[float]] = defaultdict(list)
    for record in records:
        alike[_setting(record.spec)].append(record.duration_s)
        flops = record.theory.get("predicted_trial_flops")
        if isinstance(flops, (int, float)) and record.duration_s > 0:
            rates[_machine(record.spec)].append(float(flops) / record.duration_s)
    found = {}
    for trial in plan.trials:
        if trial.state == "invalid":
            continue
        known = alike.get(_setting(trial.spec))
        rate = rates.get(_machine(trial.spec))
        if known:
            found[trial.trial_id] = statistics.median(known)
        elif rate and (flops := trial.forecast.get("trial_flops")) is not None:
            found[trial.trial_id] = flops / statistics.median(rate)
    return found


def total(trials: Sequence[PlannedTrial], seconds: Mapping[str, float]) -> float | None:
    """Seconds of all these trials one after the other; those that nothing tells take as long as the others.

    None if nothing tells of any.
    """
    known = [seconds[trial.trial_id] for trial in trials if trial.trial_id in seconds]
    return sum(known) / len(known) * len(trials) if known else None


def _records(study: Study) -> Iterable[TrialRecord]:
    own = list(itertools.islice(_measured(study), _MOST_RECORDS))
    if own:
        return own
    beside = (record for each in studies(study.path.parent) for record in _measured(each))
    return itertools.islice(beside, _MOST_RECORDS)


def _measured(study: Study) -> Iterator[TrialRecord]:
    for record in study.each(as_trained=True):
        if isinstance(record, TrialRecord) and record.outcome.status == "ok":
            yield record


def _setting(spec: Mapping[str, Any]) -> str:
    """A spec without what replicates it."""
    return json.dumps({key: value for key, value in spec.items() if key not in REPLICATES}, sort_keys=True)


def _machine(spec: Mapping[str, Any]) -> tuple[Any, Any]:
    return spec.get("device"), spec.get("threads")
