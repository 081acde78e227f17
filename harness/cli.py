"""The command line: `harness run` and `harness plan`, and the doors to the other commands.

Hydra is driven part by part instead of through `hydra.main`, which would print tracebacks and choose the
exit codes. It is imported only by what composes.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import logging
import math
import os
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import usage, wording
from harness.arguments import Parser
from harness.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_USAGE, HarnessError, UsageError
from harness.paths import conf_dir

if TYPE_CHECKING:
    from hydra._internal.hydra import Hydra
    from omegaconf import DictConfig

    from harness.plan import Plan

_CONFIG_NAME = "config"
#: Those of Hydra that are written `--flag=VALUE`, and ours.
_FLAGS_WITH_VALUE = (
    "--cfg",
    "--package",
    "--config-path",
    "--config-name",
    "--config-dir",
    "--info",
    "--specs",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; what a user got wrong is one line on standard error."""
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except HarnessError as error:
        wording.complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        wording.complain("interrupted")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _drop_output()
        return EXIT_FAILED
    except OSError as error:
        if error.filename is not None:
            raise
        _drop_output()
        wording.complain(f"cannot write the output: {error.strerror}")
        return EXIT_FAILED


def _drop_output() -> None:
    """Let the interpreter's last flush go nowhere, so that it does not complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage.MAIN, end="")
        return EXIT_OK if arguments else EXIT_USAGE
    if arguments == ["--version"]:
        from harness.sweep import DISTRIBUTION, versions

        print("harness", versions().get(DISTRIBUTION, "(not installed)"))
        return EXIT_OK
    name, rest = arguments[0], arguments[1:]
    if name not in _COMMANDS:
        raise UsageError(wording.unknown_command(name, list(_COMMANDS)))
    return _COMMANDS[name](rest)


# The commands. Each imports what it needs: `list` starts without pandas, `gate` without Hydra.


def _run(argv: list[str]) -> int:
    options = _parse(argv, command="run")
    if options.help or options.cfg or options.info or options.shell_completion:
        return _hydra_output(options, usage.RUN)
    code, _ = _run_all(options)
    return code


def _plan(argv: list[str]) -> int:
    from harness import estimate, progress
    from harness.plan import spec_lines

    options = _parse(argv, command="plan")
    if options.help or options.cfg or options.info or options.shell_completion:
        return _hydra_output(options, usage.PLAN)
    with _planned(options, dry=True) as sweeps:
        for sweep in sweeps:
            seconds = estimate.durations(sweep.plan)
            print(progress.headline(sweep.plan, seconds=estimate.total(sweep.plan.to_run, seconds)))
            print(*progress.plan_lines(sweep.plan, seconds=seconds), sep="\n")
        lines = "".join(spec_lines(sweep.plan) for sweep in sweeps)
    if options.specs:
        try:
            Path(options.specs).write_text(lines, encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write --specs {options.specs}: {error.strerror}") from error
    return EXIT_OK


def _list(argv: list[str]) -> int:
    from harness import commands

    return commands.list_main(argv)


def _show(argv: list[str]) -> int:
    from harness import commands

    return commands.show_main(argv)


def _rm(argv: list[str]) -> int:
    from harness import commands

    return commands.rm_main(argv)


def _import(argv: list[str]) -> int:
    from harness import importing

    return importing.main(argv)


def _report(argv: list[str]) -> int:
    from harness import report

    return report.main(argv)


def _gate(argv: list[str]) -> int:
    from harness.gates import command

    return command.main(argv)


def _baseline(argv: list[str]) -> int:
    from harness.gates import baseline

    return baseline.main(argv)


def _status(argv: list[str]) -> int:
    from harness import status

    return status.main(argv)


def _evaluate(argv: list[str]) -> int:
    from harness import evaluating

    return evaluating.main(argv, compose=_compose_plainly)


def _doctor(argv: list[str]) -> int:
    from harness import doctor

    return doctor.main(argv, compose=_compose_plainly)


def _compose_plainly(overrides: list[str]) -> Mapping[str, Any]:
    """The plain data of one trial's spec.

    Raises:
        UsageError: something is wrong with what was typed.
    """
    from hydra.types import RunMode

    from hydra_plugins.harness_sweeper import plain_config

    with _hydra(_parse([], command="run")) as hydra, _reworded(hydra, _CONFIG_NAME, overrides):
        _refuse_sweep(overrides)
        config = hydra.compose_config(config_name=_CONFIG_NAME, overrides=overrides, run_mode=RunMode.RUN)
        return plain_config(config)


def _completion(argv: list[str]) -> int:
    from harness import completion

    return completion.main(argv, commands=_COMMANDS, settings=_settings_beginning)


def _settings_beginning(line: str) -> list[str]:
    """What the last word of a line of overrides can become, by Hydra."""
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    with _hydra(_parse([], command="run")) as hydra:
        plugin = DefaultCompletionPlugin(hydra.config_loader)
        return [word for word in plugin._query(_CONFIG_NAME, line) if not word.startswith("hydra")]


_COMMANDS: Mapping[str, Callable[[list[str]], int]] = {
    "run": _run,
    "plan": _plan,
    "list": _list,
    "show": _show,
    "import": _import,
    "evaluate": _evaluate,
    "status": _status,
    "report": _report,
    "baseline": _baseline,
    "gate": _gate,
    "rm": _rm,
    "doctor": _doctor,
    "completion": _completion,
}


def run(overrides: Sequence[str]) -> list[Path]:
    """Run a sweep from Python and return the folders of its studies; commas need no `-m` here.

    Raises:
        HarnessError: what `harness run` would report in one line.
    """
    options = _parse(["-m", *(word for word in overrides if word not in ("-m", "--multirun"))], command="run")
    code, studies = _run_all(options)
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    return studies


# Sweeps


@dataclass(frozen=True, kw_only=True)
class _Sweep:
    """One experiment, planned: what would run, and the sweeper that launches it."""

    plan: Plan
    sweeper: Any
    command: str


def _run_all(options: argparse.Namespace) -> tuple[int, list[Path]]:
    """Plan every experiment before any runs, so that a mistake in the second is told at once."""
    from harness.sweep import carry_out

    codes, studies = [EXIT_OK], []
    with _planned(options, dry=False) as sweeps:
        for sweep in sweeps:
            sweep.plan.placement.study.create()
        for sweep in sweeps:
            studies.append(sweep.plan.placement.study.path)
            codes.append(
                carry_out(sweep.plan, launch=functools.partial(_launch, sweep), command=sweep.command)
            )
            if codes[-1] == EXIT_INTERRUPTED:
                break
    return max(codes), studies


def _launch(sweep: _Sweep) -> list[str]:
    """Run the trials through Hydra's launcher; what kept records from being written, each in one line."""
    from hydra.core.utils import JobStatus

    returns = sweep.sweeper.launch(sweep.plan)
    failed = [job._return_value for job in returns if job.status is JobStatus.FAILED]
    messages = Counter(f"{type(error).__name__}: {error}" for error in failed)
    return [
        f"{wording.counted(n, 'trial')} could not be recorded: {message}; the same command does the rest"
        for message, n in messages.items()
    ]


def run_job(config: DictConfig) -> dict[str, str]:
    """Run one trial; what a Hydra launcher calls, here or in a process of its own.

    A trial that fails is data, in its record. Only what keeps a record from being written is raised.

    Raises:
        OSError: the record could not be written.
    """
    from harness.plan import block_of
    from harness.runner import Job, record_failure, run_trial
    from harness.server import ServerError, process_server
    from hydra_plugins.harness_sweeper import placement_of, plain_config

    plain = plain_config(config)
    job = Job(placement=placement_of(config), spec=plain, **json.loads(config.cell))
    server = process_server()
    server.for_block(block_of(job.cell))
    try:
        (decoded,) = server.decode([plain], check_device=True)
    except ServerError as error:
        record = record_failure(job, str(error), code=server.code)
    else:
        if decoded.spec is None:
            record = record_failure(job, decoded.error, code=server.code)
        elif decoded.trial_id != job.trial_id:
            fault = f"the job was composed to trial {decoded.trial_id}, not to the planned {job.trial_id}"
            record = record_failure(job, fault, code=server.code)
        else:
            job = replace(job, spec=decoded.spec, backend=decoded.backend, timed=decoded.timed)
            made = run_trial(job, server=server)
            return {"trial_id": job.trial_id, "status": "claimed" if made is None else made.outcome.status}
    return {"trial_id": job.trial_id, "status": record.outcome.status}


# Hydra


def _parse(argv: Sequence[str], *, command: str) -> argparse.Namespace:
    """Read the command line with Hydra's own parser, so that its flags mean what they mean elsewhere."""
    from hydra._internal.utils import get_args_parser

    parser = get_args_parser()
    parser.__class__ = Parser
    parser.prog = f"harness {command}"
    if command == "plan":
        parser.add_argument("--specs", metavar="FILE")
    _refuse_dashed(argv)
    options = parser.parse_intermixed_args(list(argv))
    if options.experimental_rerun or options.hydra_help:
        raise UsageError(
            "--experimental-rerun and --hydra-help do not work here; 'harness run --help' tells what does"
        )
    if options.resolve and not options.cfg:
        raise UsageError("--resolve goes with --cfg")
    options.command = command
    options.words = list(argv)
    return options


def _refuse_dashed(argv: Sequence[str]) -> None:
    """Hydra's parser would take `--experiment=quick` for the beginning of a flag of its own."""
    for word in argv:
        key, equals, value = word.lstrip("-").partition("=")
        if word.startswith("--") and equals and f"--{key}" not in _FLAGS_WITH_VALUE:
            raise UsageError(f"{word}: settings are typed without dashes: {key}={value}")


@contextmanager
def _hydra(options: argparse.Namespace) -> Iterator[Hydra]:
    """A Hydra of its own for one command."""
    from hydra import version
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    version.setbase("1.3")
    main = Path(options.config_path).absolute() if options.config_path else conf_dir()
    if not main.is_dir():
        raise UsageError(f"the config folder {main} is not there")
    search_path = create_config_search_path(str(main))
    if options.config_dir is not None:
        extra = Path(options.config_dir).absolute()
        if not extra.is_dir():
            raise UsageError(f"--config-dir {options.config_dir}: there is no such folder")
        anchor = SearchPathQuery(provider="schema")
        search_path.prepend(provider="command-line", path=f"file://{extra}", anchor=anchor)
    GlobalHydra.instance().clear()
    try:
        yield Hydra.create_main_hydra2(task_name="harness", config_search_path=search_path)
    finally:
        GlobalHydra.instance().clear()


def _config_name(options: argparse.Namespace) -> str:
    return options.config_name or _CONFIG_NAME


@contextmanager
def _planned(options: argparse.Namespace, *, dry: bool) -> Iterator[list[_Sweep]]:
    """The sweeps of a command, one for each experiment, with the machinery to launch them alive.

    Raises:
        UsageError: something is wrong with what was typed, or nothing of a sweep is valid.
    """
    from harness.server import process_server

    with _hydra(options) as hydra:
        try:
            sweeps = [
                _plan_one(hydra, options, overrides, dry=dry)
                for overrides in _split_experiments(hydra, options.overrides)
            ]
            yield sweeps
        finally:
            process_server().close()


def _plan_one(hydra: Hydra, options: argparse.Namespace, overrides: list[str], *, dry: bool) -> _Sweep:
    from hydra._internal.callbacks import Callbacks
    from hydra.core.plugins import Plugins
    from hydra.types import HydraContext, RunMode
    from omegaconf import OmegaConf

    with _reworded(hydra, _config_name(options), overrides):
        config = hydra.compose_config(
            config_name=_config_name(options), overrides=overrides, run_mode=RunMode.MULTIRUN
        )
        if not (options.multirun or config.hydra.mode == RunMode.MULTIRUN):
            _refuse_sweep(overrides)
            # Another sweeper, refused below, need not know these.
            if "also" in config.hydra.sweeper:
                config.hydra.sweeper.params, config.hydra.sweeper.also = {}, []
        sweeper: Any = Plugins.instance().instantiate_sweeper(
            hydra_context=HydraContext(config_loader=hydra.config_loader, callbacks=Callbacks(config)),
            task_function=run_job,
            config=config,
        )
        if not hasattr(sweeper, "plan"):
            raise UsageError("hydra/sweeper: the harness sweeps with its own sweeper (hydra/sweeper=harness)")
        # A node may have a device that this machine does not have: there the job itself tells.
        local = str(config.hydra.launcher._target_).endswith((".BasicLauncher", ".JoblibLauncher"))
        arguments = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        plan = sweeper.plan(arguments, check_device=local and not dry, forecast=dry)
    _require_valid(plan)
    if not dry:
        _warn_of_crowding(plan, config)
    flags = ["-m"] if options.multirun else []
    command = shlex.join(["harness", "run", *flags, *overrides])
    return _Sweep(plan=plan, sweeper=sweeper, command=command)


def _warn_of_crowding(plan: Plan, config: DictConfig) -> None:
    """Trials side by side that want more threads than there are CPUs measure each other."""
    from omegaconf import OmegaConf

    from harness.environment import available_cpus
    from hydra_plugins.harness_sweeper import most_threads

    launcher, threads = config.hydra.launcher, most_threads(plan)
    # Jobs of Slurm and Ray ask for as many CPUs as they need, unless it is typed.
    key = "ray.remote.num_cpus" if "ray" in launcher else "cpus_per_task"
    asked = OmegaConf.select(launcher, key)
    if asked is not None and asked < threads:
        wording.complain(
            f"hydra.launcher.{key}={asked:g} for trials of {threads} threads: their times say little; "
            f"set threads={max(1, math.floor(asked))}"
        )
    n_jobs = int(launcher.get("n_jobs", 1) or 1)
    cpus = available_cpus()
    jobs = min(n_jobs if n_jobs > 0 else max(1, cpus + 1 + n_jobs), len(plan.to_run))
    if jobs > 1 and jobs * threads > cpus:
        wording.complain(
            f"{jobs} trials at once with {threads} threads each on {wording.counted(cpus, 'CPU')}: their "
            f"times say little; set threads={max(1, cpus // jobs)}"
        )


def _require_valid(plan: Plan) -> None:
    """A command of which nothing can be run is a mistake, not data.

    Raises:
        UsageError: no trial is valid.
    """
    if len(plan.invalid) < len(plan.trials):
        return
    reasons = list(Counter(trial.reason for trial in plan.invalid))
    if plan.single:
        raise UsageError(reasons[0])
    shown = "; ".join(reasons[:3]) + (f"; and {len(reasons) - 3} more" if len(reasons) > 3 else "")
    raise UsageError(f"none of the {len(plan.trials)} trials is valid: {shown}")


def _split_experiments(hydra: Hydra, overrides: Sequence[str]) -> list[list[str]]:
    """The command line of each experiment: Hydra alone drops their sweeps when several are named."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with _reworded(hydra, _CONFIG_NAME, overrides):
        parsed = OverridesParser.create(config_loader=hydra.config_loader).parse_overrides(list(overrides))
    lines = list(overrides)
    for index, override in enumerate(parsed):
        if override.get_key_element() == "experiment" and override.is_discrete_sweep():
            return [
                [*lines[:index], f"experiment={name}", *lines[index + 1 :]]
                for name in override.sweep_string_iterator()
            ]
    return [lines]


def _refuse_sweep(overrides: Sequence[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_sweep_override():
            raise UsageError(
                f"{override.input_line} holds several values: add -m to sweep over them, "
                "or write [a,b] for a list"
            )


def _hydra_output(options: argparse.Namespace, text: str) -> int:
    """What Hydra's own flags print."""
    from hydra.types import RunMode

    name = _config_name(options)
    with _hydra(options) as hydra:
        if options.help:
            groups = hydra.format_config_groups(lambda group: not group.startswith("hydra"))
            print(text, end="")
            print(*(f"  {line}" for line in groups.splitlines()), sep="\n")
            return EXIT_OK
        with _reworded(hydra, name, options.overrides):
            mode = RunMode.MULTIRUN if options.multirun else RunMode.RUN
            hydra.compose_config(config_name=name, overrides=options.overrides, run_mode=mode)
            if options.shell_completion:
                hydra.shell_completion(config_name=name, overrides=options.overrides)
            elif options.info:
                with _untouched_logging():
                    hydra.show_info(options.info, config_name=name, overrides=options.overrides)
            else:
                _show_config(hydra, options)
    return EXIT_OK


@contextmanager
def _untouched_logging() -> Iterator[None]:
    """Take back the handler through which Hydra prints what --info asks for."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def _show_config(hydra: Hydra, options: argparse.Namespace) -> None:
    try:
        with redirect_stderr(io.StringIO()):
            hydra.show_cfg(
                config_name=_config_name(options),
                overrides=options.overrides,
                cfg_type=options.cfg,
                package=options.package,
                resolve=options.resolve,
            )
    except SystemExit:
        raise UsageError(f"--package {options.package}: there is no such part of the config") from None


@contextmanager
def _reworded(hydra: Hydra, config_name: str, overrides: Sequence[str]) -> Iterator[None]:
    """Turn what Hydra raises into one line that names the value, the rule and the mend.

    Raises:
        UsageError: instead of Hydra's errors.
    """
    from hydra_plugins.harness_sweeper import COMPOSITION_ERRORS, explain

    try:
        yield
    except COMPOSITION_ERRORS as error:
        message = explain(error, loader=hydra.config_loader, config_name=config_name, overrides=overrides)
        raise UsageError(message) from error
