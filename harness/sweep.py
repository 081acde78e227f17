"""A planned sweep from its first line to its report; how its trials are launched is the caller's."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from harness import wording
from harness.claims import claim_path, drop_dead, read_claim
from harness.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK
from harness.plan import Plan, look_up, study_info
from harness.progress import Progress, clock, headline, invalid_lines, outcomes
from harness.runner import forget_invalid, record_invalid
from harness.server import process_server

DISTRIBUTION = "reformer-harness"
_VERSIONED = (DISTRIBUTION, "torch", "numpy", "hydra-core", "pandas")


def carry_out(plan: Plan, *, launch: Callable[[], list[str]], command: str) -> int:
    """Run what a plan wants, say how it goes, write the report, and return the exit code.

    Args:
        launch: runs the trials; returns what went wrong outside them, each in one line.
        command: what was typed, to be kept with the study.
    """
    study = plan.placement.study
    drop_dead(study)
    study.drop_torn()
    forget_invalid(plan)
    study.write_info(study_info(plan, command=command, versions=versions()))
    print(headline(plan))
    for trial, line in zip(plan.invalid, invalid_lines(plan), strict=True):
        record_invalid(plan, trial)
        print(line)
    watch = Progress(plan, stream=sys.stdout, live=sys.stdout.isatty())
    try:
        faults = _watched(launch, watch)
    except KeyboardInterrupt:
        process_server().close()
        done = f"{watch.finished} of {wording.counted(watch.total, 'trial')} done"
        wording.complain(f"interrupted: {done}; the same command does the rest")
        return EXIT_INTERRUPTED
    for fault in faults:
        wording.complain(fault)
    if watch.total:
        done = f"{watch.finished} of {wording.counted(watch.total, 'trial')} in {clock(watch.elapsed_s)}"
        print(f"{done}: {outcomes(watch.statuses)}")
    code = _verdict(plan)
    _build_report(study.path)
    return EXIT_FAILED if faults else code


def _watched(launch: Callable[[], list[str]], watch: Progress) -> list[str]:
    try:
        with watch:
            return launch()
    except Exception as error:
        reason = wording.one_line(f"{type(error).__name__}: {error}")
        return [f"the launcher failed: {reason}; the same command does the rest"]


def _verdict(plan: Plan) -> int:
    """The exit code that the study deserves now, as far as this sweep is concerned."""
    study = plan.placement.study
    valid = [trial for trial in plan.trials if trial.state != "invalid"]
    found = [look_up(study, trial.trial_id, code=plan.code) for trial in valid]
    missing = [trial for trial, result in zip(valid, found, strict=True) if result.state == "new"]
    failed = sum(result.failed for result in found)
    stale = sum(result.state == "stale" for result in found)
    if stale:
        print(f"measured with other code: {wording.counted(stale, 'trial')} (rerun=stale measures again)")
    if failed:
        hint = "rerun=failed tries again, 'harness show TRIAL' tells why"
        print(f"failed: {wording.counted(failed, 'trial')} ({hint})")
    if missing:
        claims = [read_claim(claim_path(study, trial.trial_id)) for trial in missing]
        taken = sum(claim is not None and claim.alive for claim in claims)
        hint = f"{taken} of them run in another process"
        print(f"without a record: {wording.counted(len(missing), 'trial')} ({hint})")
    return EXIT_FAILED if missing or failed else EXIT_OK


def _build_report(study: Path) -> None:
    """Write the report; if that fails the sweep was still a success, and its records are there."""
    try:
        from harness.report import build

        page = build(study)
    except Exception as error:
        wording.complain(
            f"the report could not be written ({type(error).__name__}: {error}); the records are complete: "
            f"try 'harness report {study.name}'"
        )
    else:
        print(f"report: {_relative(page)}")


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def versions() -> dict[str, str]:
    """Of what a study was made with, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
