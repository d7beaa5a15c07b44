"""One figure of small panels, drawn once and written as PDF, PNG and SVG.

All that shows a series (line, band, markers, its place in the legend) carries the series' id, so
that a page can follow one label through every figure.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.engine.folder import write_text
from fedkd.report.charts.svg import themed
from fedkd.report.style import GRID, INK, RULES, WIDE, WIDTH, series

LONGEST = 46
SHEET = {
    **RULES,
    **{f"{part}.color": INK for part in ("text", "xtick", "ytick")},
    **{f"axes.{part}color": INK for part in ("edge", "label", "title")},
    "grid.color": GRID,
    # The grid marks the ticks already.
    **{f"{part}.{kind}.size": 0 for part in ("xtick", "ytick") for kind in ("major", "minor")},
    "svg.fonttype": "none",
    "svg.hashsalt": "fedkd",
    "path.simplify_threshold": 0.3,
}


@dataclass
class Sheet:
    """A figure with its panels in reading order, and which ids and legend entries it has.

    ``kind`` is what ids begin with: ``series`` where numbers are those of labels.
    """

    figure: Any
    panels: list[Any]
    entries: dict[int, tuple[Any, str]] = field(default_factory=dict)
    notes: list[tuple[Any, str]] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    kind: str = "series"

    def mark(self, artist: Any, k: int, part: str = "") -> Any:
        """Give an artist the id of series ``k``; ids are unique in a figure."""
        first = f"{self.kind}-{k}" + (f"-{part}" if part else "")
        name, n = first, 2
        while name in self.ids:
            name, n = f"{first}{'' if part else '-line'}-{n}", n + 1
        self.ids.add(name)
        artist.set_gid(name)
        return artist

    def line(self, axes: Any, k: int, label: str, x: Any, y: Any, **style: Any) -> None:
        """Draw a line; ``marker=True`` puts the series' marker on every point."""
        look = series(k)
        marker = look.pop("marker")
        shown = {"marker": marker, "markersize": 3.6} if style.pop("marker", False) else {}
        self.mark(axes.plot(x, y, **{**look, **shown, **style})[0], k)
        self.enter(k, label)

    def points(
        self, axes: Any, k: int, label: str, x: Any, y: Any, hollow: Any = None, size: float = 4.2
    ) -> None:
        """Draw markers alone; those that ``hollow`` names are not filled."""
        look = series(k)
        where = np.zeros(len(x), bool) if hollow is None else np.asarray(hollow, bool)
        for some, inner in ((~where, look["color"]), (where, "none")):
            if some.any():
                (drawn,) = axes.plot(
                    np.asarray(x)[some], np.asarray(y)[some], look["marker"], markersize=size,
                    color=look["color"], markerfacecolor=inner, zorder=3,
                )  # fmt: skip
                self.mark(drawn, k, "points")
        self.enter(k, label)

    def band(self, axes: Any, k: int, x: Any, low: Any, high: Any, alpha: float) -> None:
        """Shade the interval of a line, where there is one."""
        if not np.isnan(np.asarray(low, float)).all():
            around = [*x, *x[::-1]], [*low, *high[::-1]]
            drawn = axes.fill(*around, color=series(k)["color"], alpha=alpha, linewidth=0)
            self.mark(drawn[0], k, "band")

    def bars(self, axes: Any, k: int, x: Any, low: Any, high: Any, across: bool = False) -> None:
        """Draw intervals as bars, upright or ``across``, where there are any."""
        every = zip(x, low, high, strict=True)
        known = [(a, b, c) for a, b, c in every if math.isfinite(b) and math.isfinite(c)]
        if known:
            at, bottom, top = zip(*known, strict=True)
            draw = axes.hlines if across else axes.vlines
            hue = series(k)["color"]
            self.mark(draw(at, bottom, top, color=hue, linewidth=0.9, alpha=0.75), k, "interval")

    def enter(self, k: int, label: str) -> None:
        """Put a series into the legend, once."""
        if k not in self.entries:
            from matplotlib.lines import Line2D

            look: dict[str, Any] = {**series(k), "markersize": 4}
            self.entries[k] = (Line2D([], [], **look), label)

    def legend(self) -> None:
        """Put the legend below everything, in as many columns as fit, in the order of the labels.

        Notes (what a grey line is) come last.
        """
        order = sorted(self.entries)
        handles = [self.entries[k][0] for k in order] + [artist for artist, _ in self.notes]
        texts = [plain(self.entries[k][1]) for k in order] + [text for _, text in self.notes]
        if not texts:
            return
        room = 58 * self.figure.get_figwidth() / WIDTH
        columns = max(1, min(len(texts), int(room // (max(map(len, texts)) + 8))))
        # As even rows as that many columns allow.
        columns = math.ceil(len(texts) / math.ceil(len(texts) / columns))
        # A label may begin with what hides it from legends: the text is put in afterwards.
        made = self.figure.legend(
            handles, ["x"] * len(texts), loc="outside lower center", ncols=columns,
            columnspacing=1.4, handlelength=2.8,
        )  # fmt: skip
        for i, (handle, text) in enumerate(zip(made.legend_handles, made.get_texts(), strict=True)):
            text.set_text(texts[i])
            if i < len(order):
                self.mark(handle, order[i], "legend")
                self.mark(text, order[i], "legend-text")


def plain(text: str) -> str:
    """Return a name as a figure can show it: one line, no formulas, not too long.

    >>> plain("two" + chr(10) + "lines"), len(plain("$")), len(plain("long" * 99))
    ('two lines', 2, 46)
    """
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = shown if len(shown) <= LONGEST else shown[: LONGEST - 1] + "…"
    return shown.replace("$", r"\$")


def size(panels: int) -> tuple[int, int]:
    """Return rows and columns for a number of panels.

    >>> [size(n) for n in (1, 2, 4, 5, 6)]
    [(1, 1), (1, 2), (2, 2), (2, 3), (2, 3)]
    """
    columns = 1 if panels == 1 else 2 if panels in (2, 4) else 3
    return math.ceil(panels / columns), columns


@contextmanager
def sheet(
    stem: Path,
    series_: int,
    panels: int = 1,
    height: float = 0.0,
    wide: bool = False,
    shared: bool = True,
) -> Iterator[Sheet]:
    """Give a figure of so many panels; write it when the block is left.

    Args:
        stem: the files without suffix.
        series_: how many entries the legend will have, for which room is made.
        panels: how many; one is as wide as a column, several as two.
        height: inches of one panel; 0: what suits their width.
        wide: whether one panel, too, is as wide as two columns.
        shared: whether all panels have the same axes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = size(panels)
    width = WIDE if wide or columns > 1 else WIDTH
    below = 0.1 * series_ + 0.25 if columns == 1 else 0.06 * series_ + 0.25
    with matplotlib.rc_context(SHEET), warnings.catch_warnings():
        # A label may hold what the font does not.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        tall = rows * (height or (2.75 if columns == 1 else 2.15)) + below
        figure = Figure(figsize=(width, tall), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False)
        every = list(grid.flat)
        for axes in every[panels:]:
            axes.set_visible(False)
        for axes in every[max(0, panels - columns) : panels]:
            axes.tick_params(labelbottom=True)
        made = Sheet(figure, every[:panels])
        yield made
        made.legend()
        _write(figure, stem)


def _write(figure: Any, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(stem.with_name(stem.name + ".png"), dpi=200)
    # What was laid out once need not be laid out again for the other files.
    figure.set_layout_engine("none")
    # Without dates the same results give the same files.
    figure.savefig(stem.with_name(stem.name + ".pdf"), metadata={"CreationDate": None})
    vector = stem.with_name(stem.name + ".svg")
    figure.savefig(vector, metadata={"Date": None}, transparent=True)
    write_text(vector, themed(vector.read_text(encoding="utf-8")) + "\n")


def outer(made: Sheet, x: str, y: str) -> None:
    """Name the axes where they are not shared with a neighbour; y once a row, x once a column."""
    _, columns = size(len(made.panels))
    for i, axes in enumerate(made.panels):
        if i % columns == 0:
            axes.set_ylabel(y)
        if i + columns >= len(made.panels):
            axes.set_xlabel(x)


def whole(axes: Any) -> None:
    """Let an axis of rounds have whole numbers only; a single round stands in its middle."""
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
    axes.locator_params(axis="x", integer=True, nbins=6)


def clipped(axes: Any, low: float, high: float) -> None:
    """Let an axis end where values do: intervals may leave what is possible."""
    bottom, top = axes.get_ylim()
    if max(bottom, low) < min(top, high):
        axes.set_ylim(max(bottom, low), min(top, high))


def thinned(length: int, most: int) -> Sequence[int]:
    """Return at most so many places of a series, evenly, always with the first and the last.

    >>> list(thinned(5, 10)), list(thinned(9, 3))
    ([0, 1, 2, 3, 4], [0, 4, 8])
    """
    if length <= most:
        return range(length)
    return sorted({round(i * (length - 1) / (most - 1)) for i in range(most)})
