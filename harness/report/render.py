"""A document as HTML and as Markdown. Every text is escaped here, whatever it came from."""

from __future__ import annotations

import base64
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from tabulate import tabulate

from harness.report.document import Cell, Document, Table

#: What means something anywhere in a line; an underscore inside a word does not.
_MARKDOWN_SPECIAL = re.compile(r"[\\`*|~$]|(?<!\w)_|_(?!\w)")
#: What means something at the start of a line only.
_MARKDOWN_START = re.compile(r"^(#{1,6}|[-+]|\d+[.)])(?=\s|$)")
#: Brackets that make a link, an image or a definition; others read better as they are.
_MARKDOWN_LINK = re.compile(r"\][(\[:]")


def html(document: Document) -> str:
    """One file that opens without a network: styles, script and figures are inside."""
    return _render("report.html.j2", document=document)


def markdown(document: Document) -> str:
    """The same in Markdown, with links to the files of the figures."""
    text = _render("report.md.j2", document=document)
    return re.sub(r"\n{3,}", "\n\n", text)


def data_uri(svg: str) -> str:
    """An image inside the page; as an image its content can run nothing and fetch nothing."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    brackets = _MARKDOWN_LINK.search(text) is not None
    escaped = _MARKDOWN_SPECIAL.sub(r"\\\g<0>", text)
    if brackets:
        escaped = re.sub(r"[\[\]]", r"\\\g<0>", escaped)
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_START.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", escaped)


def code_block(text: str) -> str:
    """Text in a fence longer than any fence in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def markdown_table(table: Table) -> str:
    """A pipe table."""
    rows = [[_markdown_cell(cell) for cell in row] for row in table.rows]
    headers = [escape_markdown(header) or " " for header in table.headers]
    aligned = ["left" if index < table.n_labels else "right" for index in range(len(headers))]
    return tabulate(
        rows, headers=headers, tablefmt="pipe", colalign=aligned if rows else None, disable_numparse=True
    )


def _markdown_cell(cell: Cell) -> str:
    text = escape_markdown(f"{cell.text} {cell.detail}".strip()) or " "
    return f"[{text}]({cell.href})" if cell.href and re.fullmatch(r"[\w./-]+", cell.href) else text


def _render(name: str, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("harness", "templates"),
        autoescape=select_autoescape(("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "data_uri": data_uri,
        "md": escape_markdown,
        "md_table": markdown_table,
        "md_code": code_block,
    }
    return environment.get_template(name).render(**values)
