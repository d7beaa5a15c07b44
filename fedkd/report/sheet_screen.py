"""Sheets in a terminal: as many columns as fit, and what did not fit is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedkd.report.sheets import Sheet

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def show(sheets: Sequence[Sheet], console: Console) -> None:
    """Print each sheet with as many columns as fit, and its notes below."""
    from rich.text import Text

    for number, sheet in enumerate(sheets):
        if number:
            console.print()
        console.print(Text(sheet.title, style="bold"))
        count = fitting(sheet, console)
        console.print(_table(sheet, count))
        if count < len(sheet.columns):
            titles = ", ".join(column.title for column in sheet.columns[count:])
            missing = f"Not shown for want of width: {titles}; see {sheet.name}.md and .csv."
            console.print(Text(missing, style="dim"))
        for note in sheet.notes:
            console.print(Text(note, style="dim"))


def fitting(sheet: Sheet, console: Console) -> int:
    """Return how many columns fit into the width of a console, at least one."""
    from rich.measure import Measurement

    unbounded = console.options.update(max_width=10_000)
    count = len(sheet.columns)
    while count > 1:
        needed = Measurement.get(console, unbounded, _table(sheet, count)).minimum
        if needed <= console.width:
            break
        count -= 1
    return count


def _table(sheet: Sheet, count: int) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for index, column in enumerate(sheet.columns[:count]):
        texts = [row[index].text for row in sheet.rows]
        if column.kind == "text":
            longest = max((len(text) for text in texts), default=0)
            table.add_column(Text(column.title), min_width=min(20, longest), overflow="fold")
        else:
            # Numbers never break over lines: columns are left out instead.
            width = max(len(part) for part in (*texts, *column.title.split()))
            table.add_column(Text(column.title), justify="right", width=width)
    for number, row in enumerate(sheet.rows):
        ends = number + 1 < len(sheet.rows) and sheet.block_of(number) != sheet.block_of(number + 1)
        cells = [
            Text(" ".join(cell.text.split()), style="bold" if cell.best else "")
            for cell in row[:count]
        ]
        table.add_row(*cells, end_section=ends and sheet.block > 0)
    return table
