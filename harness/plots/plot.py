"""A figure with the words that belong to it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from matplotlib.figure import Figure

from harness.formatting import plain


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure of a report.

    Args:
        name: of its files, without suffix.
        section: the part of the report that it belongs to.
        task: the task whose trials it shows; empty for all.
        title: a heading, in words.
        caption: how to read it, and what it leaves out.
        alt: what it shows, for those who do not see it.
    """

    name: str
    section: str
    task: str = ""
    title: str
    caption: str
    alt: str
    figure: Figure

    def __post_init__(self) -> None:
        # Tasks and factors are part of the name, and a foreign record can call them anything.
        for field in ("title", "caption", "alt"):
            object.__setattr__(self, field, plain(getattr(self, field)))
        object.__setattr__(self, "name", re.sub(r"[^A-Za-z0-9_.-]+", "_", self.name)[:80])
