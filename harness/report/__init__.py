"""The report of a study: tables, figures, a page and a Markdown file under `report/`."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from harness import aggregate, effects, plots, store
from harness.arguments import parser_for
from harness.errors import EXIT_OK, HarnessError, UsageError
from harness.plots import style
from harness.report import render
from harness.report.document import Picture
from harness.report.sections import Placed, Study, document

__all__ = ["build", "main", "read_study"]

_TRIALS_AT_ONCE = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """`harness report STUDY`: (re)build everything under `report/`, and say where it is."""
    parser = parser_for(
        "report",
        description="(Re)build tables, figures and report.html from the records of a study.",
        examples=("harness report quick", "harness report results/mine"),
    )
    parser.add_argument("study", help="name of the study, or its folder")
    try:
        options = parser.parse_args(argv)
        path = build(store.open_study(options.results_dir, options.study).path)
    except HarnessError as error:
        print(f"harness report: {error}", file=sys.stderr)
        return error.exit_code
    print(path)
    return EXIT_OK


def build(study_path: Path) -> Path:
    """Write the report of a study, whatever state it is in; hands back the path of `report.html`.

    Raises:
        UsageError: there is no study, or its folder cannot be written to.
    """
    folder = store.Study(Path(study_path))
    if not folder.trials.is_dir():
        raise UsageError(f"no study at {folder.path} (it has no folder trials/)")
    with _without_collecting():
        study = read_study(folder)
        try:
            return _write(study, report=folder.report)
        except OSError as error:
            why = error.strerror or error
            raise UsageError(f"cannot write the report to {folder.report}: {why}") from error


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Records make no cycles, and looking for some among millions of numbers takes seconds."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_study(folder: store.Study) -> Study:
    """Records, tables and effects of a study, whatever state it is in."""
    digests, records, unreadable = [], [], []
    for found in folder.each():
        if isinstance(found, store.Unreadable):
            unreadable.append(found)
            continue
        digests.append(aggregate.digest(found))
        # Thousands of whole records would not fit: tables are made of digests, figures of thin curves.
        records.append(replace(found, samples=(), series=plots.thinned(found.series)))
    digests = aggregate.by_age(digests)
    records.sort(key=lambda record: (record.started_at, record.trial_id))
    info = folder.read_info()
    factors = aggregate.typed_levels(info)
    trials = aggregate.table(digests, study=folder.path.resolve().name, factors=factors)
    return Study(
        name=folder.path.resolve().name,
        info=info,
        records=records,
        digests=digests,
        unreadable=unreadable,
        trials=trials,
        effects=effects.effects(trials, factors=factors),
        factors=factors,
    )


def _write(study: Study, *, report: Path) -> Path:
    figures = report / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for old in (*figures.glob("*.svg"), *figures.glob("*.png")):
        old.unlink()
    _write_tables(study, report=report)
    pictures = []
    names: set[str] = set()
    for plot in plots.draw_all(study.trials, records=study.records, factors=study.factors):
        # Long or odd names of factors can end up as one.
        name = plot.name if plot.name not in names else f"{plot.name}-{len(names)}"
        names.add(name)
        svg = style.save(plot.figure, folder=figures, name=name)
        picture = Picture(name=name, title=plot.title, caption=plot.caption, alt=plot.alt, svg=svg)
        pictures.append(Placed(section=plot.section, task=plot.task, picture=picture))
    whole = document(study, pictures=pictures)
    store.write_atomically(report / "report.md", render.markdown(whole))
    page = report / "report.html"
    store.write_atomically(page, render.html(whole))
    return page


def _write_tables(study: Study, *, report: Path) -> None:
    summary = aggregate.summary(study.trials, records=study.digests, factors=study.factors)
    for name, frame in (("trials", study.trials), ("summary", summary), ("effects", study.effects)):
        store.write_atomically(report / f"{name}.csv", frame.to_csv(index=False))
    _write_parquet(study.trials, path=report / "trials.parquet")
    _write_samples(study.digests, path=report / "samples.parquet")


def _write_parquet(frame: pd.DataFrame, *, path: Path) -> None:
    # An all-empty column has no type that Parquet could keep; as text it is at least there.
    empty = [name for name in frame.columns if frame[name].dtype == object]
    frame.astype(dict.fromkeys(empty, "str")).to_parquet(path, index=False)


def _write_samples(digests: Sequence[aggregate.Digest], *, path: Path) -> None:
    """Part after part: a table of all values of thousands of trials would not fit."""
    parts = (digests[at : at + _TRIALS_AT_ONCE] for at in range(0, max(1, len(digests)), _TRIALS_AT_ONCE))
    tables = (pa.Table.from_pandas(aggregate.samples(part), preserve_index=False) for part in parts)
    first = next(tables)
    repeating = [name for name in aggregate.SAMPLE_COLUMNS if name != "value"]
    with pq.ParquetWriter(path, first.schema, use_dictionary=repeating) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
