"""Who says what in a play: read from lines of JSON, or put together from LEAF's windows.

LEAF's windows overlap almost entirely. To divide them into training and test rows would train on
what is tested, so the running text is restored first, and windows that cannot be are refused.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedkd.errors import DataError, nearest

KEYS = ("play", "role", "text")
COLUMNS = ("character_id", "x", "y")
OVERLAP = 8
"""So many characters have to agree for a window to continue the one before it."""
BREAKS = 0.1
"""The share of windows that may begin a new passage; of shuffled ones nearly all do."""


def read_roles(path: str) -> dict[str, str]:
    """Return the text of each role, ``{"play/role": text}``, from lines of JSON, plain or gzip.

    A line has the keys play, role and text; empty lines are passed over, and a role of several
    lines has their texts below each other.

    Raises:
        DataError: the file is missing or damaged, or a line is no such object.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"shakespeare: path = {path!r}: there is no such file")
    texts: dict[str, list[str]] = {}
    try:
        content = file.read_bytes()
        raw = gzip.decompress(content) if file.suffix == ".gz" else content
        lines = raw.decode("utf-8").split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        kind = "gzip of UTF-8 text" if file.suffix == ".gz" else "UTF-8 text"
        raise DataError(
            f"shakespeare: {path} is no {kind} ({error}); end its name in .gz if it is compressed "
            "and only then, or fetch it again"
        ) from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            play, role, text = _fields(line, f"shakespeare: {path}, line {number}")
            texts.setdefault(f"{play}/{role}", []).append(text)
    return {owner: "\n".join(parts) for owner, parts in texts.items()}


def _fields(line: str, where: str) -> tuple[str, ...]:
    wanted = 'expected {"play": "...", "role": "...", "text": "..."}'
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is not JSON ({error}); {wanted}") from error
    if not isinstance(entry, dict):
        raise DataError(f"{where} is no object but {type(entry).__name__}; {wanted}")
    for key in KEYS:
        if key not in entry:
            found = ", ".join(sorted(entry)) or "nothing"
            raise DataError(
                f"{where} has no key {key!r}{nearest(key, entry)} (found: {found}); {wanted}"
            )
        if not isinstance(entry[key], str):
            raise DataError(f"{where}: {key} is {entry[key]!r}; {wanted}")
    return tuple(entry[key] for key in KEYS)


def from_windows(table: Any) -> dict[str, str]:
    """Return the text of each role from an Arrow table of windows in the order of the text.

    Columns: ``character_id``, who speaks; ``x``, some characters of the text; ``y``, the next one.
    A window that overlaps with the end of its role's text so far adds only what is new; any other
    begins a new passage on a line of its own.

    Raises:
        DataError: a column or cell is missing, or more than a tenth of the windows, beside each
            role's first, continue nothing: they are no windows, or in another order.
    """
    passages: dict[str, list[str]] = {}
    ends: dict[str, str] = {}
    rows = breaks = 0
    for owner, x, y in _cells(table):
        window, rows = x + y, rows + 1
        before = ends.get(owner)
        ends[owner] = window
        if before is None:
            passages[owner] = [window]
            continue
        old = _overlap(before, x)
        breaks += not old
        passages[owner].append(window[old:] if old else "\n" + window)
    if breaks > BREAKS * max(rows - len(passages), 0):
        raise DataError(
            f"shakespeare: {breaks} of {rows} windows do not continue the one before them, so the "
            "text cannot be put together, and test rows would overlap with training rows; give the "
            "windows in the order of the text, or the roles themselves as path"
        )
    return {owner: "".join(parts) for owner, parts in passages.items()}


def _overlap(before: str, x: str) -> int:
    """Return how many characters ``x`` begins with are the last ones of ``before``; 0 for few."""
    for start in range(1, len(before) - OVERLAP + 1):
        if x.startswith(before[start:]):
            return len(before) - start
    return 0


def _cells(table: Any) -> Iterator[tuple[str, str, str]]:
    for column in COLUMNS:
        if column not in table.column_names:
            found = ", ".join(table.column_names)
            raise DataError(
                f"shakespeare: there is no column {column!r}{nearest(column, table.column_names)} "
                f"(found: {found})"
            )
    row = 0
    # In parts: millions of windows are a few hundred MB as Python strings.
    for batch in table.select(list(COLUMNS)).to_batches(max_chunksize=1 << 16):
        for cells in zip(*(batch.column(i).to_pylist() for i in range(3)), strict=True):
            if not all(isinstance(cell, str) for cell in cells):
                raise DataError(
                    f"shakespeare: row {row} holds {cells!r}; expected three texts, "
                    f"{', '.join(COLUMNS)}"
                )
            yield cells
            row += 1
