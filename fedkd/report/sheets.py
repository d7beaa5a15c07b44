"""A table before it is written: cells that know their text, their numbers and whether they lead.

The same sheet becomes Markdown, CSV, LaTeX, JSON, a terminal table and a table of the page.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedkd.axes import named
from fedkd.report.tables import Column
from fedkd.types import Estimate

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class Heading:
    """What a column is; ``kind`` decides how its cells are written.

    ``text`` is aligned left, ``number`` and ``estimate`` right; an ``estimate`` becomes value, low,
    high, n and method in CSV. Columns that are not ``paper`` are left out of LaTeX.
    """

    key: str
    title: str
    kind: Literal["text", "number", "estimate"] = "text"
    paper: bool = True


@dataclass(frozen=True)
class Cell:
    """``text`` as shown, what it was made of, and whether it is among the best of its block."""

    text: str = ""
    value: Plain = None
    estimate: Estimate | None = None
    best: bool = False

    @property
    def sort(self) -> float | str:
        """What a table is sorted by: the number where there is one, else the text.

        >>> Cell("0.1 %", 0.001).sort, Cell("fedavg", "fedavg").sort
        (0.001, 'fedavg')
        """
        found = self.value if self.estimate is None else self.estimate.value
        return float(found) if isinstance(found, int | float) else self.text


@dataclass(frozen=True)
class Sheet:
    """One table: ``rows`` hold a cell for each of ``columns``.

    Rows that agree in the first ``block`` columns belong together. ``caption`` says in a paper what
    numbers and intervals are; ``timed`` sheets hold wall-clock times and differ between runs.
    """

    name: str
    title: str
    columns: tuple[Heading, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    block: int = 0
    caption: str = ""
    timed: bool = False

    def block_of(self, row: int) -> tuple[str, ...]:
        """Return what the rows of a block share; empty where a sheet has no blocks."""
        return tuple(cell.text for cell in self.rows[row][: self.block])

    def without_empty(self) -> Sheet:
        """Return this sheet without the columns of estimates in which there is no number."""
        kept = [
            i
            for i, column in enumerate(self.columns)
            if column.kind != "estimate" or any(row[i].estimate is not None for row in self.rows)
        ]
        columns = tuple(self.columns[i] for i in kept)
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return replace(self, columns=columns, rows=rows)


def plain_cell(value: Plain) -> Cell:
    """Return a cell of a plain value, named as in experiment files."""
    return Cell("" if value is None else named(value), value)


def estimate_cell(column: Column, estimate: Estimate | None, best: bool = False) -> Cell:
    """Return a cell of an estimate as ``column`` shows it."""
    if estimate is not None and math.isnan(estimate.value):
        estimate = None
    return Cell(column.show(estimate), None, estimate, best)


def plus_minus(estimate: Estimate | None, best: bool = False, scale: float = 100.0) -> Cell:
    """Return a number ± half of its interval; one that is not symmetric as it is, in brackets.

    >>> plus_minus(Estimate(0.5, 0.4, 0.6, 3, "t")).text
    '50.0 ± 10.0'
    >>> plus_minus(Estimate(0.5, 0.3, 0.6, 3, "bootstrap")).text
    '50.0 [30.0, 60.0]'
    """
    if estimate is None or math.isnan(estimate.value):
        return Cell("–")
    value, low, high = (f"{scale * v:.1f}" for v in (estimate.value, estimate.low, estimate.high))
    above, below = estimate.high - estimate.value, estimate.value - estimate.low
    if math.isnan(estimate.low):
        text = value
    elif math.isclose(above, below, rel_tol=1e-6, abs_tol=1e-9):
        text = f"{value} ± {scale * above:.1f}"
    else:
        text = f"{value} [{low}, {high}]"
    return Cell(text, None, estimate, best)
