"""More cells of the train × eval grid, on weights that were kept: `harness evaluate`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from harness.arguments import parser_for
from harness.claims import claimed
from harness.environment import code_fingerprint
from harness.errors import EXIT_FAILED, EXIT_OK, HarnessError, UsageError
from harness.progress import label
from harness.record import RecordError, Sample, TrialRecord, measurement_from_json
from harness.server import ForkServer, ServerError, process_server
from harness.store import Study, open_study
from harness.wording import complain, counted

_TARGET = "harness.workloads.evaluate.Evaluate"
_KEYS = ("n_hashes", "hash_seeds", "controls")

#: Composes overrides into the plain data of a spec.
Compose = Callable[[list[str]], Mapping[str, Any]]


def main(argv: Sequence[str], *, compose: Compose) -> int:
    """`harness evaluate STUDY evaluate.…`."""
    parser = parser_for(
        "evaluate",
        description="Evaluate the trained weights of a study under more settings, without training: their "
        "results join the records. The trials must have been run with train.save_weights=true.",
        examples=(
            "harness run experiment=hash_rounds train.save_weights=true study=mine",
            "harness evaluate mine 'evaluate.n_hashes=[16,32]'",
            "harness evaluate mine 'evaluate.controls=[oracle]' 'evaluate.hash_seeds=[3,4,5]'",
        ),
        epilog="\nexit codes: 0 all were evaluated, 1 some were not, 2 wrong usage",
    )
    parser.add_argument("study", metavar="STUDY")
    parser.add_argument("settings", nargs="+", metavar="evaluate.KEY=[…]", help=f"of {', '.join(_KEYS)}")
    arguments = parser.parse_args(argv)
    typed = _typed(arguments.settings, compose=compose)
    study = open_study(arguments.results_dir, arguments.study)
    chosen, left_out = _evaluable(study)
    for reason in left_out:
        complain(reason)
    if not chosen:
        raise UsageError(
            f"study {study.name} has no weights to evaluate; train with train.save_weights=true rerun=all"
        )
    info, failed = study.read_info(), 0
    server = process_server()
    try:
        for position, record in enumerate(chosen, 1):
            told = label(record.cell, info.get("factors", {}))
            try:
                added = evaluate_more(study, record, typed, server=server)
            except (HarnessError, ServerError) as error:
                failed += 1
                complain(f"{record.trial_id} {told}: {error}")
            else:
                print(f"[{position}/{len(chosen)}] {told}  {counted(added, 'result')}", flush=True)
    finally:
        server.close()
    return EXIT_FAILED if failed or left_out else EXIT_OK


def evaluate_more(
    study: Study, record: TrialRecord, settings: Mapping[str, Any], *, server: ForkServer
) -> int:
    """Evaluate one trial's weights under more settings and store what comes out with its record.

    Args:
        settings: keys of the group `evaluate`; hash seeds are those of the trial if none are given.

    Returns:
        How many results came out, those included that replace an earlier one.

    Raises:
        HarnessError: the weights or the settings cannot be evaluated, or another process has the trial.
    """
    weights = study.weights_path(record.trial_id).absolute()
    spec = {
        **record.spec,
        "workload": {"_target_": _TARGET, "weights": str(weights)},
        "train": {key: value for key, value in record.spec["train"].items() if key != "save_weights"},
        "evaluate": {
            "n_hashes": [],
            "controls": [],
            "hash_seeds": record.spec["evaluate"]["hash_seeds"],
            **settings,
        },
    }
    (decoded,) = server.decode([spec], check_device=True)
    if decoded.spec is None:
        raise HarnessError(decoded.error)
    out, log = server.scratch() / "evaluated.json", server.scratch() / "evaluated.log"
    with claimed(study, record.trial_id, timeout_s=None) as mine:
        if not mine:
            raise HarnessError("another process is at this trial; try again when it is done")
        ending = server.run(decoded.spec, out=out, log=log)
        if ending.exit != 0:
            raise HarnessError(f"its process ended with {ending.exit or f'signal {ending.signal}'}")
        measurement = measurement_from_json(out.read_text(encoding="utf-8"))
        if measurement.outcome.status != "ok":
            raise HarnessError(measurement.outcome.message)
        study.write(replace(record, samples=_merged(record.samples, measurement.samples)))
    return len({_place(sample)[1:] for sample in measurement.samples})


def _merged(known: Sequence[Sample], more: Sequence[Sample]) -> tuple[Sample, ...]:
    """All samples, newer ones in place of older ones of the same quantity under the same setting."""
    places = {_place(sample) for sample in more}
    return (*(sample for sample in known if _place(sample) not in places), *more)


def _place(sample: Sample) -> tuple[Any, ...]:
    return sample.metric, sample.phase, frozenset(sample.at.items())


def _evaluable(study: Study) -> tuple[list[TrialRecord], list[str]]:
    """Trials whose weights can be evaluated, and in one line each why others cannot."""
    code = code_fingerprint()
    chosen, reasons = [], []
    for path in sorted((study.path / "weights").glob("*.safetensors")):
        record = None
        with contextlib.suppress(RecordError):
            record = study.read(path.stem)
        if record is None or record.outcome.status != "ok":
            reasons.append(f"{path.stem}: there are weights, but no good record of that trial")
        elif record.code != code:
            reasons.append(f"{path.stem}: was trained with other code; 'rerun=stale' trains it again")
        else:
            chosen.append(record)
    return chosen, reasons


def _typed(words: Sequence[str], *, compose: Compose) -> dict[str, Any]:
    """The settings that were typed, as plain data.

    Raises:
        UsageError: another key, or a value that cannot be.
    """
    keys = []
    for word in words:
        group, _, key = word.partition("=")[0].partition(".")
        if group != "evaluate" or key not in _KEYS:
            raise UsageError(f"{word}: give settings of evaluate: evaluate.{{{','.join(_KEYS)}}}=[…]")
        keys.append(key)
    composed = compose(list(words))["evaluate"]
    return {key: composed[key] for key in keys}
