"""The command line as it is typed: what is recorded, said and returned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import harness
from harness import cli
from harness.environment import available_cpus
from harness.errors import UsageError
from harness.paths import conf_dir
from harness.record import TrialRecord
from harness.server import Decoded, ForkServer, ServerError
from tests.harness.conftest import FAKE_CONF, Shell, gone, harness_environment

HARNESS = [sys.executable, "-P", "-m", "harness"]


# Trials and sweeps


def test_one_trial(shell: Shell) -> None:
    result = shell.fake("run", "threads=1")
    assert result.code == 0
    assert result.err == ""
    first, second, third, fourth = result.out.splitlines()
    assert first == "study default: 1 trial (1 new), 1 to run"
    assert second.startswith("[1/1] ok  accuracy 0.750  2k tokens/s  1 MiB  ")
    assert third.startswith("1 of 1 trial in 0:0")
    assert fourth == "report: results/default/report/report.html"
    (record,) = shell.records()
    assert record.cell == {"seed": "0"}
    assert record.experiment == "default"


def test_a_sweep_and_its_study(shell: Shell) -> None:
    result = shell.fake(
        "run", "-m", "attention.n_hashes=1,2", "model.residual=plain,reversible", "study=mine"
    )
    assert result.code == 0
    assert "[4/4] ok  n_hashes=" in result.out
    assert len({json.dumps(record.cell) for record in shell.records("mine")}) == 4
    info = shell.study("mine").read_info()
    assert info["factors"] == {"attention.n_hashes": ["1", "2"], "model.residual": ["plain", "reversible"]}
    assert info["command"].startswith("harness run -m workload=fake attention.n_hashes=1,2")
    assert {"python", "torch", "hydra-core"} <= set(info["versions"])


def test_the_same_command_again_runs_nothing(shell: Shell) -> None:
    command = ["run", "-m", "attention.n_hashes=1,2"]
    shell.fake(*command)
    before = {path: path.stat().st_mtime_ns for path in shell.study().trials.glob("*.json")}
    again = shell.fake(*command)
    assert again.code == 0
    assert "study default: 2 trials (2 done), 0 to run" in again.out
    assert {path: path.stat().st_mtime_ns for path in shell.study().trials.glob("*.json")} == before


def test_a_wider_sweep_runs_only_what_is_new_and_merges_levels(shell: Shell) -> None:
    shell.fake("run", "-m", "attention.n_hashes=1,2")
    result = shell.fake("run", "-m", "attention.n_hashes=2,4")
    assert "2 trials (1 done, 1 new), 1 to run" in result.out
    assert shell.study().read_info()["factors"] == {"attention.n_hashes": ["1", "2", "4"]}


def test_a_torn_record_is_measured_again(shell: Shell) -> None:
    shell.fake("run", "-m", "attention.n_hashes=1,2")
    path = sorted(shell.study().trials.glob("*.json"))[0]
    path.write_text(path.read_text()[:100])
    result = shell.fake("run", "-m", "attention.n_hashes=1,2")
    assert "(1 done, 1 new), 1 to run" in result.out
    assert shell.statuses() == ["ok", "ok"]


def test_failures_are_data_and_an_exit_code(shell: Shell) -> None:
    command = ["run", "-m", "workload.does=succeed,raise,kill_itself,allocate_in_torch"]
    result = shell.fake(*command)
    assert result.code == 1
    assert shell.statuses() == ["error", "killed", "ok", "out_of_memory"]
    assert "1 ok, 1 out_of_memory, 1 error, 1 killed" in result.out
    assert "failed: 2 trials (rerun=failed tries again" in result.out
    again = shell.fake(*command)
    assert (again.code, "0 to run" in again.out) == (1, True)
    retried = shell.fake(*command, "rerun=failed")
    assert "2 to run" in retried.out
    assert len(list((shell.study().trials / "superseded").glob("*.json"))) == 2


@pytest.mark.parametrize(
    "behaviour", [["workload.does=allocate_in_python"], ["workload.seconds=20", "timeout_s=0.3"]]
)
def test_out_of_memory_and_timeout_are_no_failure(behaviour: Sequence[str], shell: Shell) -> None:
    assert shell.fake("run", *behaviour).code == 0
    assert shell.statuses()[0] in ("out_of_memory", "timeout")
    assert shell.records()[0].environment["backend"]  # known although the trial could not tell it


def test_memory_limit(shell: Shell) -> None:
    result = shell.fake("run", "workload.does=allocate_until_refused", "memory_limit_gib=0.25")
    assert result.code == 0
    assert shell.statuses() == ["out_of_memory"]


def test_records_of_other_code_are_told_and_measured_again_on_demand(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.fake("run")
    (record,) = shell.records()
    stale = record.__class__(**{**record.__dict__, "code": "other"})
    shell.study().write(stale)
    result = shell.fake("run")
    assert "measured with other code: 1 trial (rerun=stale measures again)" in result.out
    assert "1 to run" in shell.fake("run", "rerun=stale").out
    assert shell.records()[0].code == record.code


def test_invalid_cells_come_first_and_the_rest_runs(shell: Shell) -> None:
    result = shell.fake("run", "-m", "attention.n_buckets=4,3", "attention.n_hashes=1,2")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[0] == "study default: 4 trials (2 new, 2 invalid), 2 to run"
    assert lines[1].startswith("invalid  n_buckets=3 n_hashes=1  n_buckets=3: ")
    assert shell.statuses() == ["invalid", "invalid", "ok", "ok"]


def test_a_study_of_which_nothing_is_valid_is_not_made(shell: Shell) -> None:
    single = shell.fake("run", "model.d_model=30")
    assert (single.code, single.out) == (2, "")
    assert single.complaint.startswith("harness: d_model=30: not divisible by n_heads=4")
    sweep = shell.fake("run", "-m", "model.d_model=30", "seed=0,1")
    assert (sweep.code, sweep.out) == (2, "")
    assert sweep.complaint.startswith("harness: none of the 2 trials is valid: d_model=30: ")
    assert list(shell.folder.iterdir()) == []


def test_experiments_run_one_after_the_other_each_into_its_own_study(shell: Shell) -> None:
    result = shell("run", "-cd", FAKE_CONF, "experiment=fake_sweep,fake_seeds", "train.steps=5")
    assert result.code == 0
    assert len(shell.records("fake_sweep")) == 4
    assert len(shell.records("fake_seeds")) == 3
    assert {record.spec["train"]["steps"] for record in shell.records("fake_seeds")} == {5}
    assert shell.study("fake_seeds").read_info()["command"] == (
        "harness run experiment=fake_seeds train.steps=5"
    )


def test_nothing_runs_when_the_second_experiment_is_wrong(shell: Shell) -> None:
    result = shell("run", "-cd", FAKE_CONF, "experiment=fake_sweep,fake_seed")
    assert result.code == 2
    assert result.complaint == (
        "harness: experiment=fake_seed: no such experiment; did you mean 'fake_seeds'? "
        f"there are: {', '.join(known_experiments())}"
    )
    assert list(shell.folder.iterdir()) == []


def known_experiments() -> list[str]:
    folders = (FAKE_CONF / "experiment", conf_dir() / "experiment")
    return sorted(path.stem for folder in folders for path in folder.glob("*.yaml"))


def test_one_study_for_two_experiments_that_share_trials(shell: Shell) -> None:
    result = shell("run", "-cd", FAKE_CONF, "experiment=fake_sweep,fake_seeds", "study=both")
    assert result.code == 0
    assert len(shell.records("both")) in (6, 7)


def test_each_seed_is_measured_by_a_server_of_its_own(fresh_shell: Shell) -> None:
    assert fresh_shell.fake("run", "-m", "seed=0,1", "attention.n_hashes=1,2").code == 0
    servers: dict[int, set[str]] = {}
    for record in fresh_shell.records():
        servers.setdefault(record.spec["seed"], set()).add(record.environment["server_id"])
    assert [len(ids) for ids in servers.values()] == [1, 1]
    assert servers[0] != servers[1]


def test_hydra_leaves_no_folders(shell: Shell) -> None:
    shell.fake("run", "-m", "seed=0,1")
    assert [path.name for path in shell.folder.iterdir()] == ["results"]
    assert sorted(path.name for path in shell.study().path.iterdir()) == ["logs", "study.json", "trials"]


def test_a_trial_claimed_by_another_sweep_is_left_to_it(shell: Shell) -> None:
    from harness.claims import claimed

    planned = shell.fake("plan")
    trial_id = planned.out.split("new ")[-1].split()[0]
    shell.study().create()
    with claimed(shell.study(), trial_id, timeout_s=None):
        result = shell.fake("run")
    assert result.code == 1
    assert "without a record: 1 trial (1 of them run in another process)" in result.out


def test_a_job_that_is_not_the_planned_trial_is_an_error(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra_plugins.harness_sweeper import _sweeper

    def wrong(plan: Any, trial_id: str, cell: Any) -> str:
        return json.dumps({"trial_id": "0" * 12, "cell": dict(cell), "planned_at": plan.made_at})

    monkeypatch.setattr(_sweeper, "job_ticket", wrong)
    assert shell.fake("run").code == 1
    (record,) = shell.records()
    assert record.outcome.status == "error"
    assert "not to the planned 000000000000" in record.outcome.message


def test_a_server_that_fails_a_job_is_an_error_of_that_trial(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, calls = ForkServer.decode, []

    def fail_the_second(self: ForkServer, configs: Sequence[Any], **options: bool) -> list[Decoded]:
        calls.append(configs)
        if len(calls) == 2:
            raise ServerError("the measuring process is away")
        if len(calls) == 3:
            return [Decoded(trial_id="x", error="device=cuda: it has gone away")]
        return decode(self, configs, **options)

    monkeypatch.setattr(ForkServer, "decode", fail_the_second)
    assert shell.fake("run", "-m", "attention.n_hashes=1,2,4").code == 1
    messages = [record.outcome.message for record in shell.records()]
    assert messages == ["the measuring process is away", "device=cuda: it has gone away", ""]


def test_a_report_that_fails_is_one_line_and_changes_no_exit_code(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> Path:
        raise LookupError("no\nfont")

    monkeypatch.setattr("harness.report.build", fail)
    result = shell.fake("run")
    assert result.code == 0
    assert result.complaint.startswith("harness: the report could not be written (LookupError: no font)")


def test_a_disk_that_is_full_is_told_and_fails(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.store import Study

    def full(self: Study, record: TrialRecord) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Study, "write", full)
    result = shell.fake("run")
    assert result.code == 1
    assert "1 trial could not be recorded: OSError: [Errno 28] No space left" in result.complaint


def test_a_launcher_that_fails_is_told(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("the cluster is away")

    monkeypatch.setattr(BasicLauncher, "launch", fail)
    result = shell.fake("run")
    assert result.code == 1
    assert "the launcher failed: ConnectionError: the cluster is away" in result.complaint


def test_a_server_that_cannot_start_is_one_line(fresh_shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    (fresh_shell.folder / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(fresh_shell.folder))
    monkeypatch.setattr("harness.server._server_variables", lambda: dict(os.environ))
    result = fresh_shell.fake("run")
    assert (result.code, result.out) == (1, "")
    assert result.complaint.startswith("harness: the measuring process ended by itself (exit code 1): ")


# What a user gets wrong


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["attention.n_hashs=2"], "unknown key 'attention.n_hashs'; did you mean 'attention.n_hashes'?"),
        (["n_buckets=2"], "unknown key 'n_buckets'; did you mean 'attention.n_buckets'?"),
        (["n_hashes=2"], "unknown key 'n_hashes'; did you mean 'attention.n_hashes' or 'evaluate.n_hashes'?"),
        (["zzz=2"], "unknown key 'zzz'; 'harness run --cfg job' prints every key"),
        (["~zzz"], "unknown key 'zzz'; 'harness run --cfg job' prints every key"),
        (["attention.kind.x=2"], "unknown key 'attention.kind.x'; did you mean 'attention.kind'?"),
        (["+task.lenght=2"], "task.lenght: no such key; did you mean task.length?"),
        (["task=copyy"], "task=copyy: no such task; did you mean 'copy'? there are: copy, text"),
        (["task=1"], "task=1: no such task; there are: copy, text"),
        (["-m", "task=text,copyy"], "task=copyy: no such task; did you mean 'copy'?"),
        (["hydra/launcher=joblob"], "hydra/launcher=joblob: no such hydra/launcher; did you mean 'joblib'?"),
        (["hydra/sweeper=basic"], "hydra/sweeper: the harness sweeps with its own sweeper"),
        (["attention.n_hashes=1,2"], "attention.n_hashes=1,2 holds several values: add -m"),
        (["attention.n_hashes=[1"], "cannot read 'attention.n_hashes=[1': no viable alternative"),
        (["task"], "cannot read 'task': missing EQUAL"),
        (["quick"], "cannot read 'quick'; did you mean experiment=quick?"),
        (["--experiment=quick"], "--experiment=quick: settings are typed without dashes: experiment=quick"),
        (["=3"], "cannot read '=3': the key is missing; write KEY=VALUE"),
        (["study=é"], "cannot read 'study=é': the character 'é' does not belong there"),
        (["gate=ci"], "gate: the group takes no part in a run; leave it out"),
        (["threads=100000"], "threads=100000: must be at most 1024"),
        (["a b"], "cannot read 'a b': there is a character that does not belong"),
        (["train.lr=${foo}"], "train.lr: Interpolation key 'foo' not found"),
        (["attention.chunk_length=0"], "chunk_length=0"),
        (["attention.n_buckets=3"], "n_buckets=3"),
        (["attention.n_hashes=two"], 'attention.n_hashes="two": must be an integer'),
        (["device=tpu"], "device='tpu': use one of cpu, cuda"),
        (["rerun=maybe"], "rerun=maybe is none of none, failed, stale, all"),
        (["timeout_s=soon"], "timeout_s=soon: it must be a number above 0"),
        (["study=a/b"], "study='a/b' is no study name"),
        (["-m", "study=a,b"], "study=a,b cannot be swept"),
        (["-m", "train.lr=interval(0,1)"], "train.lr=interval(0,1) has no levels to go through"),
        (["--cfg", "jobs"], "argument --cfg/-c: invalid choice: 'jobs'"),
        (["--cfg", "job", "-p", "tusk"], "--package tusk: there is no such part of the config"),
        (["--resolve"], "--resolve goes with --cfg"),
        (["--hydra-help"], "--experimental-rerun and --hydra-help do not work here"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["-cd", "nowhere"], "--config-dir nowhere: there is no such folder"),
        (["-cp", "nowhere"], "the config folder "),
        (["-cn", "nothing"], "Cannot find primary config 'nothing'"),
    ],
)
def test_one_line_names_value_rule_and_mend(argv: Sequence[str], complaint: str, shell: Shell) -> None:
    result = shell("run", *argv)
    assert result.code == 2
    assert result.out == ""
    assert result.complaint.startswith(f"harness: {complaint}") or complaint in result.complaint
    assert list(shell.folder.iterdir()) == []


def test_cuda_without_a_gpu(shell: Shell) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = shell.fake("run", "device=cuda")
    assert result.code == 2
    assert "device=cuda" in result.complaint
    assert shell.fake("plan", "device=cuda").code == 0


def test_a_results_folder_that_cannot_be_written(shell: Shell) -> None:
    (shell.folder / "file").write_text("")
    result = shell.fake("run", f"results_dir={shell.folder / 'file'}")
    assert result.code == 2
    assert f"results_dir={shell.folder / 'file'}: it is a file, not a folder" in result.complaint
    (shell.folder / "results").mkdir(mode=0o500)
    (shell.folder / "results" / "default").symlink_to("/proc/self")
    result = shell.fake("run")
    assert result.code == 2
    assert "cannot write to" in result.complaint
    assert "results_dir=PATH" in result.complaint


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["task=copy"], "unknown command 'task=copy'; settings come after a command: harness run task=copy"),
        (["xyzzy"], "unknown command 'xyzzy'; there are: run, plan, list"),
    ],
)
def test_unknown_commands(argv: Sequence[str], complaint: str, shell: Shell) -> None:
    result = shell(*argv)
    assert result.code == 2
    assert result.complaint.startswith(f"harness: {complaint}")


def test_a_broken_experiment_is_told_by_its_name(shell: Shell) -> None:
    (shell.folder / "conf" / "experiment").mkdir(parents=True)
    (shell.folder / "conf" / "experiment" / "odd.yaml").write_text("a: [1\n")
    result = shell("run", "-cd", "conf", "experiment=odd")
    assert result.code == 2
    assert "odd.yaml" in result.complaint


# plan


def test_plan_tells_the_states_and_writes_nothing(shell: Shell) -> None:
    shell.fake("run", "workload.does=raise")
    before = sorted(shell.folder.rglob("*"))
    result = shell.fake("plan", "-m", "workload.does=raise,succeed", "attention.n_buckets=null,3")
    assert result.code == 0
    states = [line.split()[0] for line in result.out.splitlines()[1:]]
    assert states == ["invalid", "invalid", "failed", "new"]
    (failed,) = (line for line in result.out.splitlines() if line.startswith("  failed"))
    assert "  does=raise n_buckets=null    " in failed
    assert failed.endswith("  error: LookupError: the model was not there")
    assert sorted(shell.folder.rglob("*")) == before
    assert "(runs again)" in shell.fake("plan", "workload.does=raise", "rerun=failed").out


def test_plan_exports_specs_that_the_worker_takes(shell: Shell) -> None:
    result = shell.fake("plan", "-m", "seed=0,1", "--specs", "specs.jsonl")
    assert result.code == 0
    lines = (shell.folder / "specs.jsonl").read_text().splitlines()
    assert [json.loads(line)["cell"] for line in lines] == [{"seed": "0"}, {"seed": "1"}]
    assert shell.fake("plan", "--specs", "/nowhere/specs").code == 2


# Hydra's flags, help, other commands


def test_hydras_flags_work_behind_run(shell: Shell) -> None:
    assert "n_hashes: 7" in shell("run", "--cfg", "job", "attention.n_hashes=7").out
    assert shell("run", "-c", "job", "-p", "task", "--resolve").out.startswith("# @package task\n_target_:")
    assert (
        "_target_: hydra_plugins.harness_sweeper" in shell("run", "--cfg", "hydra", "-p", "hydra.sweeper").out
    )
    assert "hydra/sweeper/harness" in shell("run", "--info", "defaults").out


@pytest.mark.parametrize("command", list(cli._COMMANDS))
def test_every_command_has_help_with_examples(command: str) -> None:
    result = subprocess.run(
        [*HARNESS, command, "--help"], capture_output=True, text=True, env=harness_environment()
    )
    assert result.returncode == 0, result.stderr
    assert f"harness {command}" in result.stdout
    assert f"\n  harness {command}" in result.stdout


def test_help_of_run_lists_the_groups(shell: Shell) -> None:
    out = shell("run", "--help").out
    assert "  task: copy, text" in out
    assert "exit codes" in out


def test_version(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell("--version").out.startswith("harness ")
    monkeypatch.setattr("harness.sweep.DISTRIBUTION", "no-such-distribution")
    assert shell("--version").out == "harness (not installed)\n"


def test_main_help(shell: Shell) -> None:
    assert shell("--help").out == shell().out
    assert (shell("--help").code, shell().code) == (0, 2)


def test_hydra_is_clean_after_each_command(shell: Shell) -> None:
    from hydra.core.global_hydra import GlobalHydra

    shell("run", "foo=1")
    assert not GlobalHydra.instance().is_initialized()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "pandas", "numpy", "hydra", "omegaconf", "psutil", "seaborn"]
    code = f"import sys, harness; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=harness_environment()
    )
    assert result.stdout == "[]\n"


def test_planning_imports_neither_torch_nor_pandas(shell: Shell) -> None:
    code = (
        "import sys; from harness import cli; cli.main(['plan'])\n"
        "print([name for name in ('torch', 'pandas', 'seaborn', 'reformer') if name in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=harness_environment()
    )
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_from_python(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = harness.run(["-cd", str(FAKE_CONF), "workload=fake", "attention.n_hashes=1,2"])
    assert list(frame["outcome"]) == ["ok", "ok"]
    assert set(frame["attention.n_hashes"]) == {1, 2}
    assert len(harness.load("default")) == 2
    with pytest.raises(UsageError, match="no study 'nope'"):
        harness.load("nope")
    with pytest.raises(UsageError, match="unknown key"):
        harness.run(["zzz=1"])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_launch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        harness.run(["-cd", str(FAKE_CONF), "workload=fake", "seed=7"])


def test_ctrl_c_while_planning(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ForkServer, "decode", interrupt)
    result = shell.fake("run")
    assert (result.code, result.err) == (130, "harness: interrupted\n")


# Interruption and launchers, in a process of its own


def start(shell: Shell, *argv: str) -> subprocess.Popen[str]:
    command = [*HARNESS, "run", "-cd", str(FAKE_CONF), "workload=fake", *argv]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=shell.folder,
        env=harness_environment(),
        start_new_session=True,
    )


def wait_for_claims(shell: Shell, n: int) -> list[int]:
    """Wait until so many trials run; returns the pids of the processes that hold them."""
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        claims = list(shell.study().trials.glob("*.claim"))
        logs = [path for path in (shell.study().path / "logs").glob("*.log") if path.stat().st_size]
        if len(claims) >= n and len(logs) >= n:
            return [json.loads(path.read_text())["pid"] for path in claims]
        time.sleep(0.05)
    raise AssertionError("no trial has started")


def offspring(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def test_ctrl_c_ends_everything_and_keeps_what_is_done(shell: Shell) -> None:
    shell.fake("run")
    process = start(shell, "-m", "seed=0,1", "workload.seconds=0,30")
    wait_for_claims(shell, 1)
    children = offspring(process.pid)
    while len(children) < 2:
        children = offspring(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert err.splitlines() == [err.strip()]
    assert err.startswith("harness: interrupted: ")
    assert err.endswith("the same command does the rest\n")
    assert "Traceback" not in out
    assert all(gone(child) for child in children)
    assert list(shell.study().trials.glob("*.claim")) == []
    assert set(shell.statuses()) <= {"ok"}


def test_a_sweep_that_is_killed_leaves_no_process_and_goes_on_later(shell: Shell) -> None:
    process = start(shell, "workload.seconds=1.5")
    wait_for_claims(shell, 1)
    children = offspring(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while not all(gone(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len(list(shell.study().trials.glob("*.claim"))) == 1
    result = shell.fake("run", "workload.seconds=1.5")
    assert result.code == 0
    assert shell.statuses() == ["ok"]


def test_kill_9_of_a_trial_and_the_sweep_goes_on(shell: Shell) -> None:
    process = start(shell, "-m", "workload.seconds=3", "attention.n_hashes=1,2", "timeout_s=30", "retries=0")
    wait_for_claims(shell, 1)
    time.sleep(0.3)
    (server,) = [pid for pid in offspring(process.pid) if offspring(pid)]
    os.kill(offspring(server)[0], signal.SIGKILL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert shell.statuses() == ["killed", "ok"]
    assert "killed by SIGKILL" in out


def test_a_reader_that_goes_away_is_no_error(shell: Shell) -> None:
    line = f"{' '.join(HARNESS)} list tasks | head -c 1"
    result = subprocess.run(line, shell=True, capture_output=True, text=True, env=harness_environment())
    assert result.stderr == ""


@pytest.mark.slow
def test_a_full_disk_behind_the_output_is_one_line(shell: Shell) -> None:
    with Path("/dev/full").open("w") as full:
        argv = [sys.executable, "-m", "harness", "list", "tasks"]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "harness: cannot write the output: No space left on device\n"


def test_joblib_runs_several_at_once_and_prints_the_same(shell: Shell) -> None:
    process = start(shell, "-m", "seed=0,1,2", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert shell.statuses() == ["ok"] * 3
    assert len({record.environment["server_id"] for record in shell.records()}) >= 2
    assert "[3/3] ok  seed=" in out


@pytest.mark.slow
def test_trials_side_by_side_that_crowd_the_machine_are_told_of(shell: Shell) -> None:
    cpus = available_cpus()
    process = start(
        shell, "-m", "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"threads={cpus}"
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    (line,) = err.splitlines()
    assert line.startswith(f"harness: 2 trials at once with {cpus} threads each on {cpus} CPU")
    assert line.endswith(f"set threads={max(1, cpus // 2)}")


@pytest.mark.slow
def test_ctrl_c_with_joblib(shell: Shell) -> None:
    arguments = [
        "-m",
        "seed=0,1,2,3",
        "workload.seconds=30",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    ]
    process = start(shell, *arguments)
    wait_for_claims(shell, 2)
    children = offspring(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "harness: interrupted: 0 of 4 trials done; the same command does the rest"
    deadline = time.monotonic() + 15
    while not all(gone(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_real_workload_from_the_shell_to_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [
        "train.steps=2",
        "evaluate.n_hashes=[1]",
        "evaluate.hash_seeds=[0]",
        "task.length=64",
        "threads=1",
    ]
    assert cli.main(["run", "-m", "attention.n_hashes=1,2", *settings]) == 0
    assert "report: results/default/report/report.html" in capsys.readouterr().out
    assert (tmp_path / "results" / "default" / "report" / "report.html").is_file()


def test_the_server_is_closed_when_a_command_ends(
    fresh_shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = []
    close = ForkServer.close

    def watched(self: ForkServer) -> None:
        closed.append(self)
        close(self)

    monkeypatch.setattr(ForkServer, "close", watched)
    assert fresh_shell.fake("run", "foo=1").code == 2
    assert closed


def test_an_interrupt_in_generated_source_still_exits_130(tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        "import os, runpy, signal, sys\n"
        "from harness import cli\n"
        "def dispatch(_):\n"
        "    exec('import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(1)')\n"
        "cli._dispatch = dispatch\n"
        "runpy.run_module('harness', run_name='__main__', alter_sys=True)\n"
    )
    environment = harness_environment()
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    command = [sys.executable, "-m", "interrupted"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (130, "harness: interrupted\n")
