"""Where commands print: a terminal gets its own width and colours, a pipe gets whole lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PIPE_WIDTH = 120


def screen(*, err: bool = False, width: int = PIPE_WIDTH) -> Console:
    """Return a console on stdout or stderr; ``width`` is that of lines that go into a pipe."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout
    fixed = None if stream.isatty() else width
    return Console(stderr=err, width=fixed, highlight=False, markup=False, soft_wrap=False)


def grid(rows: Sequence[tuple[str, str]]) -> RenderableType:
    """Return names with a text each, in two columns."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, text in rows:
        table.add_row(Text(f"  {name}"), Text(text))
    return table
