"""Notes of several runs that differ in a leading number, as one."""

from __future__ import annotations

import re
from collections.abc import Iterable


def merged(notes: Iterable[str]) -> list[str]:
    """Return notes in order, those that differ in their first number as one with its range.

    >>> merged(["3 of 9 rest on the fit", "none", "7 of 9 rest on the fit"])
    ['3 to 7 of 9 rest on the fit', 'none']
    """
    found: dict[str, list[int]] = {}
    for note in notes:
        counted = re.match(r"(\d+)( of .*)", note, re.DOTALL)
        text = counted[2] if counted else note
        found.setdefault(text, []).extend([int(counted[1])] if counted else [])
    return [f"{_range(counts)}{text}" for text, counts in found.items()]


def _range(counts: list[int]) -> str:
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return f"{low}" if low == high else f"{low} to {high}"
