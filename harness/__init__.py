"""Sweep, measure, store, report and gate ablations of the Reformer.

Importing the package imports nothing heavy: not torch, not pandas, not Hydra.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["load", "run"]


def load(study: str, results_dir: str | Path = "results") -> pd.DataFrame:
    """The trials of a study, one row each, as in `report/trials.csv`.

    Raises:
        UsageError: there is no such study.
    """
    from harness.aggregate import load as load_table
    from harness.store import open_study

    return load_table(open_study(Path(results_dir), study).path)


def run(overrides: Sequence[str]) -> pd.DataFrame:
    """Run what `harness run -m OVERRIDES…` would, and return the trials of its studies.

    Args:
        overrides: as typed on the command line, for example ``["attention.n_hashes=1,4", "study=mine"]``.

    Raises:
        HarnessError: what the command would report in one line.
    """
    import pandas as pd

    from harness import cli
    from harness.aggregate import load as load_table

    return pd.concat([load_table(study) for study in cli.run(overrides)], ignore_index=True)
