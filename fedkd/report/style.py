"""How figures look: legible at the width of one column, safe for the colour-blind and in print.

Colours are those of Okabe and Ito (2008); line styles change when they come round again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COLOURS = (*("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"),)
DASHES = ("-", "--", "-.", ":")
MARKERS = (*"osD^vP*X<>hp",)
WIDTH, WIDE = 4.2, 7.0
"""Inches: one column of a paper, and two."""
INK, GRID, BLACK = "#010000", "#dddddd", "#000001"
"""Text and axes; grid; the palette's black. Seen as black, told apart where themes replace them."""
RULES = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
    "pdf.fonttype": 42,
}


def colour(index: int) -> dict[str, str]:
    """Return the colour and line style of the line with this number; the first 28 differ.

    >>> colour(0)["color"] == colour(7)["color"], colour(0) == colour(7)
    (True, False)
    """
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
    }


def series(index: int) -> dict[str, str]:
    """Return colour, line style and marker of the series with this number; the first 84 differ.

    >>> series(0)["marker"] == series(7)["marker"], series(6)["color"] == BLACK
    (False, True)
    """
    look = colour(index)
    if look["color"] == "#000000":
        look["color"] = BLACK
    return {**look, "marker": MARKERS[index % len(MARKERS)]}


@contextmanager
def figure(height: float, stem: Path, made: list[Path]) -> Iterator[tuple[Any, Any]]:
    """Give a figure with one set of axes; write it as PNG and PDF and note both in ``made``."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(RULES):
        drawn = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasAgg(drawn)
        axes = drawn.add_subplot()
        yield drawn, axes
        stem.parent.mkdir(parents=True, exist_ok=True)
        files = [stem.with_name(stem.name + suffix) for suffix in (".png", ".pdf")]
        drawn.savefig(files[0], dpi=200)
        # What was laid out once need not be laid out again for the second file.
        drawn.set_layout_engine("none")
        # Without dates the same results give the same file.
        drawn.savefig(files[1], metadata={"CreationDate": None})
        made += files


def legend(drawn: Any, axes: Any) -> None:
    """Put the legend below the axes, where it hides nothing, in as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    longest = max((len(label) for label in labels), default=0)
    # About 58 characters of the legend's size stand beside one another in the figure's width.
    columns = max(1, min(len(labels), 58 // (longest + 8)))
    drawn.legend(handles, labels, loc="outside lower center", ncols=columns)
