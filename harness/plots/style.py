"""One look for all figures, without touching matplotlib's global state.

Figures are drawn in a few fixed colours that `themed_svg` turns into light and dark ones, so that one SVG
file suits both kinds of page.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#d9dee3"
PAPER = "#ffffff"
#: Text on coloured cells: the cell decides on it, not the page.
ON_DARK = "#fefefe"
ON_LIGHT = "#101214"
_DARK = {INK: "#e6e9ec", MUTED: "#9aa4ae", GRID: "#3a4149", PAPER: "#16191d"}

#: Colours that stay apart with any colour vision, on white and on black paper, each with a marker.
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#cc78bc", "#d55e00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")

_RC: dict[Any, Any] = {
    "figure.dpi": 100,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 160,
    "axes.facecolor": PAPER,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.title_fontsize": 9,
    "legend.frameon": False,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "svg.fonttype": "none",
    "svg.hashsalt": "harness",
    "lines.linewidth": 1.8,
}


@contextmanager
def theme() -> Iterator[None]:
    """Draw and save in the harness's style; everything is as before afterwards."""
    with mpl.rc_context(), sns.axes_style("ticks"), mpl.rc_context(_RC), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes, which is no reason to fail.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def colours(count: int) -> list[str]:
    """One colour a level: distinct ones for a few, a scale of one hue beyond."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [to_hex(colour) for colour in sns.color_palette("flare", count)]


def markers(count: int) -> list[str]:
    return [MARKERS[index % len(MARKERS)] for index in range(count)]


def dashes(count: int) -> list[str]:
    """Line styles: where curves lie on each other, all of them can be seen."""
    return [("-", "--", "-.", ":")[index % 4] for index in range(count)]


def panels(count: int, *, width: float = 9.6, height: float = 3.1) -> tuple[Figure, Sequence[Axes]]:
    """A figure with some axes side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, [figure.add_subplot(1, count, index + 1) for index in range(count)]


def legend_below(figure: Figure, axes: Axes, *, title: str | None = None) -> None:
    """One legend for all axes, under them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, title=title, loc="outside lower center", ncols=min(6, len(labels)))


def text_on(red: float, green: float, blue: float) -> str:
    """Black or white, whichever is easier to read on that colour."""
    channels = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (red, green, blue)
    )
    luminance = sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), channels, strict=True))
    return ON_DARK if luminance < 0.18 else ON_LIGHT


def save(figure: Figure, *, folder: Path, name: str) -> str:
    """Write `name.svg` and `name.png`; hands back the SVG."""
    with theme():
        # Laid out once for both, which takes as long as drawing.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        figure.savefig(folder / f"{name}.png", pil_kwargs={"compress_level": 3})
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = themed_svg(text.getvalue())
    (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
    return svg


def themed_svg(svg: str) -> str:
    """The figure with colours for dark pages, which a browser picks by itself."""
    rules = "".join(
        f'[style*="{paint}: {light}"]{{{paint}:{dark}!important}}'
        for light, dark in _DARK.items()
        for paint in ("fill", "stroke")
    )
    sheet = f"<style>@media (prefers-color-scheme: dark) {{{rules}}}</style>"
    return re.sub(r"(<svg\b[^>]*>)", lambda match: match[1] + sheet, svg, count=1)
