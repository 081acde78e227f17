"""A report as data: sections of blocks, which know nothing of HTML or Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field

from harness.formatting import plain


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One entry of a table.

    Args:
        detail: what belongs to the text but matters less, as an interval does.
        value: what to sort by; the text itself without one.
        href: a relative link.
    """

    text: str
    detail: str = ""
    value: float | None = None
    href: str | None = None


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table; the first column names the row, columns after `n_labels` hold numbers."""

    caption: str
    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    n_labels: int = 1
    sortable: bool = False
    kind: str = "table"


@dataclass(frozen=True, kw_only=True)
class Text:
    """Paragraphs, or with `bullets` the points of a list, under a heading if they have one."""

    lines: tuple[str, ...]
    title: str = ""
    bullets: bool = False
    kind: str = "text"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure with its words; `svg` is the image itself."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str = field(repr=False)
    kind: str = "picture"


@dataclass(frozen=True, kw_only=True)
class Details:
    """A line, and text behind it that keeps its line breaks."""

    summary: str
    text: str
    kind: str = "details"


Block = Table | Text | Picture | Details


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report with a heading."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]


def cell(text: object, *, detail: str = "", value: float | None = None, href: str | None = None) -> Cell:
    """A table entry from any text, made printable."""
    return Cell(text=plain(text, limit=1000), detail=plain(detail), value=value, href=href)
