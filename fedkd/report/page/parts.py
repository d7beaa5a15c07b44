"""What a page is made of: sections of facts, figures, tables, lists and code, as plain data.

The template knows these parts only, so that what a section says is decided in Python and how it
looks in the style sheet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

NUMBER = re.compile(r"[-+−]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Cell:
    """One cell of a table; ``best`` is shown in bold, ``key`` is what rows are sorted by."""

    text: str
    best: bool = False
    key: str = ""
    title: str = ""

    @property
    def number(self) -> bool:
        """Whether the cell is sorted as a number."""
        return bool(NUMBER.fullmatch(self.key))


def cell(text: str, best: bool = False, title: str = "") -> Cell:
    """Return a cell that is sorted by the number it begins with, else by its text.

    >>> cell("52.1 [50.0, 54.2]").key, cell("–").key, cell("≥ 3").key, cell("fedavg").number
    ('52.1', '', '3', False)
    """
    plain = text.strip().lstrip("≥≤<>~*").strip()
    found = NUMBER.match(plain)
    key = found.group().replace("−", "-") if found else plain.strip("–—-")
    return Cell(text, best, key, title)


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows; a new block of rows begins at each of ``breaks``.

    ``left`` are the columns of text.
    """

    id: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    left: tuple[int, ...] = (0,)
    folded: bool = False
    breaks: tuple[int, ...] = ()


def table(
    id_: str,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str] = (),
    folded: bool = False,
) -> Table:
    """Return a table of plain text."""
    cells = tuple(tuple(cell(text) for text in row) for row in rows)
    left = tuple(
        i for i in range(len(columns)) if i == 0 or not any(row[i].number for row in cells)
    )
    return Table(id_, title, tuple(columns), cells, tuple(notes), left, folded)


@dataclass(frozen=True)
class Figure:
    """A figure; ``markup`` is SVG that is safe to embed, ``image`` a data URI where there is none.

    ``wide`` ones take a row of their own.
    """

    id: str
    title: str
    caption: str
    markup: str = ""
    image: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Fact:
    """A name and what it stands for."""

    name: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Bullets:
    """A list with a title."""

    title: str
    items: tuple[str, ...]


@dataclass(frozen=True)
class Code:
    """Text to be copied; unfolded where it has no title."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """One entry of the table of contents; left out where it holds nothing."""

    id: str
    title: str
    paragraphs: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()
    code: tuple[Code, ...] = ()
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    bullets: tuple[Bullets, ...] = ()
    folded: tuple[Code, ...] = ()
    drill: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        held = (self.facts, self.code, self.tables, self.figures, self.bullets, self.folded)
        return not (any(held) or self.paragraphs or self.drill)


@dataclass(frozen=True)
class Live:
    """How a served page asks for news: ``GET state`` answers {"version": text}, ``main`` the HTML.

    Addresses are relative to the page, so that requests go to its own server only. ``token`` is
    sent as ``Authorization: Bearer``; leave it empty where a cookie or the address holds it.
    """

    state: str = "state"
    main: str = "main"
    token: str = ""
    seconds: float = 2.0


@dataclass(frozen=True)
class Status:
    """How far the runs are, for the strip above a live page."""

    finished: int
    running: int
    waiting: int
    failed: int
    under_way: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The number of all runs."""
        return self.finished + self.running + self.waiting + self.failed


@dataclass(frozen=True, kw_only=True)
class PageContent:
    """Everything that the template needs; ``island`` is JSON without ``<`` for the drill-down."""

    name: str
    subtitle: str
    sections: tuple[Section, ...]
    island: str = ""
    status: Status | None = None
    live: Live | None = None
    generator: str = field(default="fedkd")
