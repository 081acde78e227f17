"""The help texts of the commands that are not built by argparse."""

MAIN = """\
usage: harness COMMAND [arguments]

Sweep, measure, store, report and gate ablations of the Reformer.

measure
  run [-m] [KEY=VALUE ...]         one trial, or with -m a sweep over comma-separated values
  plan [-m] [KEY=VALUE ...]        the same sweep dry: the state of each trial; runs nothing
  evaluate STUDY evaluate.KEY=[…]  more evaluation settings on trained weights, without training
  import FILE ...                  bring in records that were measured elsewhere

look
  list [WHAT]                      studies, experiments, tasks or families
  show TRIAL                       one record, the end of its log, the command that repeats it
  status STUDY                     how far a running sweep is, from another shell
  report STUDY                     (re)build tables, figures and report.html from the records

compare
  baseline save STUDY --as NAME    keep a study's numbers to compare with
  gate STUDY --baseline NAME       a verdict: has it become slower, fatter or less accurate?

trust
  doctor                           let the instruments measure what is known, and tell which of them lie

tidy
  rm STUDY                         delete a study
  completion SHELL                 what bash, zsh or fish need to complete all this

'harness COMMAND --help' tells all about one of them.
Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted; run and gate tell theirs in full.
"""

_RUN = """\
usage: harness {command} [-m] [KEY=VALUE ...]

{what}

  harness {command} task.length=128 attention.n_hashes=4
  harness {command} -m attention.n_hashes=1,2,4,8 attention.n_buckets=32,64 \\
      model.residual=plain,reversible seed=0,1,2 study=mine
  harness {command} experiment=quick results_dir=/somewhere device=cuda dtype=bfloat16
  harness {command} experiment=hash_rounds,buckets      the presets one after the other

A trial that is recorded already does not run again, so the same command after Ctrl-C, a crash or a
failure does exactly the rest. What an experiment sweeps is replaced, key by key, by what is typed.

options
  -m, --multirun             sweep: commas separate values (an experiment with a sweep needs no -m)
{options}  -c, --cfg {{job,hydra,all}}  print the composed config and stop
      --resolve              ... with its interpolations resolved
  -p, --package PACKAGE      ... only this part of it
  -i, --info [WHAT]          how it was composed: all, config, defaults, defaults-tree, plugins, searchpath
  -cd, --config-dir DIR      more options for the groups below, such as DIR/experiment/mine.yaml
  -h, --help                 this text

keys that place a trial without changing its numbers
  study, results_dir         name of the study (default: the experiment's), and where studies are
  rerun                      recorded trials that run again: none, failed, stale (other code) or all
  timeout_s                  after so many seconds a trial is ended and recorded as timeout
  memory_limit_gib           a trial on the CPU that takes more is recorded as out_of_memory
  timing                     exclusive: a timed trial waits until no other one of this machine is on its
                             device; shared: it does not, and the report says that times were shared
  retries                    how often a trial is run again that was killed from outside (default 1)
  hydra/launcher             basic; joblib for several trials at once; submitit_slurm and ray for a
                             cluster (each an extra)

exit codes
  0    every trial has a record and none failed (out_of_memory, timeout, diverged are data)
  1    some trials ended in error or were killed
  2    wrong usage, or no trial is valid
  130  interrupted; nothing finished is lost

groups (GROUP=OPTION)
"""

RUN = _RUN.format(
    command="run",
    what="Measures one trial, or a sweep of them, each in a process of its own, and writes the report.",
    options="",
)

PLAN = _RUN.format(
    command="plan",
    what="""\
Shows what `harness run` with the same arguments would do: the state of each trial (invalid, failed,
stale, new, done) and why. Runs and writes nothing.""",
    options="""\
  --specs FILE               also write the valid trials to FILE, one JSON line each, every one of them
                             what `python -m harness.worker` takes on standard input
""",
)
