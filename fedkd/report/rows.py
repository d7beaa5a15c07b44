"""Rows of tables that stand for a label at a point: in which order, and what they begin with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fedkd.report.collection import Collection, Group, Value, axis_title
from fedkd.report.sheets import Cell, Heading, plain_cell


def heads(collection: Collection) -> list[Heading]:
    """Return the columns that say at which point a row is."""
    return [
        Heading(key, axis_title(key), "number" if numeric(values) else "text")
        for key, values in collection.axes.items()
    ]


def point_cells(point: Mapping[str, Value]) -> list[Cell]:
    """Return the cells of these columns."""
    return [plain_cell(value) for value in point.values()]


def finished(collection: Collection) -> Iterator[Group]:
    """Return the groups with a run, by point and then by label, as tables have them."""
    for point in collection.points():
        for label in collection.labels:
            group = collection.group(label, point)
            if group is not None and group.runs:
                yield group


def numeric(values: tuple[Value, ...]) -> bool:
    """Return whether an axis is one of numbers."""
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
