"""The tables of a collection: what each label reaches at each point, and what differs for certain.

Differences stand beside the numbers because two methods on the same seeds and clients can differ
for certain while their own intervals overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedkd.report import agreement, calibration, hacking, measures, sweep_notes
from fedkd.report.claims import spent
from fedkd.report.collection import RATIO, Collection, Group, Value, axis_title
from fedkd.report.comparison import BASELINES
from fedkd.report.measures import Target
from fedkd.report.rows import heads, numeric, point_cells
from fedkd.report.sheet_files import write
from fedkd.report.sheet_screen import show
from fedkd.report.sheets import Cell, Heading, Sheet, estimate_cell, plain_cell, plus_minus
from fedkd.report.sweep_extras import costs, missing, privacy, tuning
from fedkd.report.tables import Column
from fedkd.types import Estimate

__all__ = ["show", "tables", "write"]
Measure = Callable[[Group], Estimate | None]
BOOTSTRAP, STUDENT = "bootstrap", "t over seeds"
ACCURACY = Column("user_accuracy", "user accuracy", interval=True)
PAPER = ("bits_per_character", "epsilon", "worst_share", "jain", "rounds_to", "bytes_to")
"""What goes into LaTeX beside accuracy and differences: a page is narrow."""


def tables(collection: Collection, target: Target | None = None) -> list[Sheet]:
    """Return the sheets of a collection; those that would be empty are left out.

    ``headline`` everything of each label at each point, ``by_axis`` the accuracy of each label
    along the main axis, ``paired`` differences, ``agreement`` with teachers, ``fidelity`` what goes
    with it, ``hacking`` of teachers, ``calibration``, ``privacy``, ``tuning``, ``missing``,
    ``costs``.
    Without ``target`` rounds and bytes are counted to :func:`measures.default_target`.
    """
    wanted = measures.default_target(collection) if target is None else target
    leading = leaders(collection)
    made = [
        headline(collection, wanted, leading),
        by_axis(collection, leading),
        paired(collection),
        agreement.sheet(collection),
        agreement.together(collection),
        hacking.sheet(collection),
        calibration.sheet(collection),
        privacy(collection),
        tuning(collection),
        missing(collection),
        costs(collection),
    ]
    return [sheet for sheet in made if sheet is not None and sheet.rows]


def leaders(collection: Collection) -> set[tuple[str, int]]:
    """Return which (label, number of the point) are the best, or cannot be told from the best."""
    found = set()
    for number, point in enumerate(collection.points()):
        groups = [g for g in (collection.group(name, point) for name in collection.labels) if g]
        judged = [(g, accuracy) for g in groups if (accuracy := measures.user_accuracy(g))]
        if len(judged) < 2:
            continue
        best = max(judged, key=lambda pair: pair[1].value)[0]
        found |= {(g.label, number) for g, _ in judged if measures.tied(g, best)}
    return found


def baseline(collection: Collection, name: str, group: Group) -> Group | None:
    """Return the runs of a baseline that ``group`` is paired with: same point, same data.

    Of variants with label smoothing the one with the least. None for the baseline itself.
    """
    same = [
        other
        for other in (collection.group(label, group.point) for label in collection.labels)
        if other is not None and other.strategy == name and measures.comparable(group, other)
    ]
    plain = min(same, key=_smoothing, default=None)
    return None if plain is group else plain


def headline(collection: Collection, target: Target, leading: set[tuple[str, int]]) -> Sheet:
    """Return one row for each label at each point, with all that is measured."""
    several = any(len(group.runs) > 1 for group in collection.groups)
    first, second = (STUDENT, BOOTSTRAP) if several else (BOOTSTRAP, STUDENT)
    at = heads(collection)
    measured = _measured(target)
    columns = [*at, Heading("label", "label"), Heading(ACCURACY.key, ACCURACY.title, "estimate")]
    columns += [_difference_heading(name, first, paper=True) for name in BASELINES]
    columns += [
        Heading(column.key, column.title, "estimate", paper=column.key in PAPER)
        for column, _ in measured
    ]
    columns += [Heading("reached", "seeds at target", "number", paper=False)]
    columns += [_difference_heading(name, second, paper=False) for name in BASELINES]
    rows = []
    for number, point in enumerate(collection.points()):
        for label in collection.labels:
            group = collection.group(label, point)
            if group is None:
                continue
            accuracy = measures.user_accuracy(group)
            best = (label, number) in leading
            reached, of = measures.reached(group, target)
            cells = [*point_cells(point), plain_cell(label)]
            cells.append(estimate_cell(ACCURACY, accuracy, best) if accuracy else _failed(group))
            cells += [_against(collection, group, name, first) for name in BASELINES]
            cells += [_cell(column, measure(group), of) for column, measure in measured]
            cells.append(Cell(f"{reached} of {of}" if of else "", reached if of else ""))
            cells += [_against(collection, group, name, second) for name in BASELINES]
            rows.append(tuple(cells))
    title = "User accuracy, fairness and communication"
    return Sheet(
        "headline",
        title,
        tuple(columns),
        tuple(rows),
        sweep_notes.headline(collection, target, bool(leading)),
        block=len(at),
        caption=f"{title}. {sweep_notes.caption(collection, bool(leading), target)}",
    ).without_empty()


def _cell(column: Column, estimate: Estimate | None, seeds: int) -> Cell:
    cell = estimate_cell(column, estimate)
    if estimate is None or column.key not in ("rounds_to", "bytes_to") or estimate.n == seeds:
        return cell
    # A mean over some of the seeds only never stands alone.
    return replace(cell, text=f"{cell.text} ({estimate.n} of {seeds})")


def _measured(target: Target) -> list[tuple[Column, Measure]]:
    """Return the columns beside accuracy, with what they measure; the most asked for first."""
    return [
        (
            Column("bits_per_character", "bits per character", 1.0, 3, interval=True),
            measures.bits_per_character,
        ),
        (Column("agreement", "as its teacher", interval=True), agreement.overall),
        (Column("epsilon", "epsilon", bound=True, absent="none"), lambda g: spent(g.runs)),
        (Column("worst_share", "worst 10 %"), measures.worst_share),
        (
            Column("rounds_to", f"rounds to {target}", 1.0, 1),
            lambda g: measures.rounds_to(g, target),
        ),
        (
            Column("bytes_to", f"MB to {target}", 1e-6, -3),
            lambda g: measures.bytes_to(g, target),
        ),
        (Column("std", "std over clients"), measures.spread),
        (Column("jain", "Jain", 1.0, 3), measures.jain),
        (Column("bytes_up", "MB up", 1e-6, -3), measures.bytes_up),
        (Column("bytes_down", "MB down", 1e-6, -3), measures.bytes_down),
    ]


def by_axis(collection: Collection, leading: set[tuple[str, int]]) -> Sheet | None:
    """Return the user accuracy of each label (rows) along the main axis (columns)."""
    axis = main_axis(collection)
    if axis is None:
        return None
    points = collection.points()
    rests = collection.slices(axis)
    others = [key for key in collection.axes if key != axis]
    beside = [Heading(key, axis_title(key)) for key in others]
    values = collection.axes[axis]
    shown = [plain_cell(value).text for value in values]
    columns = [*beside, Heading("label", "label")]
    columns += [Heading(f"{axis}={text}", text, "estimate") for text in shown]
    rows = []
    for rest in rests:
        for label in collection.labels:
            found = {_key(value): group for value, group in collection.along(axis, label, rest)}
            if not found:
                continue
            row = [*(plain_cell(rest[key]) for key in others), plain_cell(label)]
            for value in values:
                group = found.get(_key(value))
                best = group is not None and (label, points.index(group.point)) in leading
                accuracy = measures.user_accuracy(group) if group else None
                lost = group is not None and accuracy is None
                row.append(_failed(group) if lost and group else plus_minus(accuracy, best))
            rows.append(tuple(row))
    title = f"User accuracy in % by {axis_title(axis)}"
    caption = f"{title}. {sweep_notes.caption(collection, bool(leading))}"
    return Sheet(
        "by_axis",
        title,
        tuple(columns),
        tuple(rows),
        sweep_notes.by_axis(collection, bool(leading)),
        block=len(others),
        caption=caption,
    )


def main_axis(collection: Collection) -> str | None:
    """Return the axis that tables and figures run along: participation, else the first of numbers.

    None where nothing varies.
    """
    axes = collection.axes
    numbers = [key for key in axes if numeric(axes[key])]
    ordered = [key for key in (RATIO, *numbers, *axes) if key in axes]
    return ordered[0] if ordered else None


def paired(collection: Collection) -> Sheet:
    """Return the differences of labels at each point, and of each label along each axis."""
    at = heads(collection)
    rows = []
    points = collection.points()
    for group in sorted(collection.groups, key=lambda g: points.index(g.point)):
        for other in _references(collection, group):
            rows.append(_difference_row(group, other, other.label))
    for axis, values in collection.axes.items():
        if not numeric(values):
            continue
        for rest in collection.slices(axis):
            for label in collection.labels:
                groups = [g for _, g in collection.along(axis, label, rest) if g.runs]
                for group in groups[:-1]:
                    against = f"{axis_title(axis)} {plain_cell(groups[-1].point[axis]).text}"
                    rows.append(_difference_row(group, groups[-1], against))
    columns = (
        *at,
        Heading("label", "label"),
        Heading("against", "against"),
        Heading("difference", f"difference ({BOOTSTRAP})", "estimate"),
        Heading("difference_t", f"difference ({STUDENT})", "estimate"),
        Heading("seeds", "seeds", "number"),
    )
    kept = tuple(row for row in rows if row[-3].estimate is not None)
    return Sheet(
        "paired",
        "Paired differences of user accuracy, in percentage points",
        columns,
        kept,
        sweep_notes.paired(collection, dropped=len(rows) - len(kept)),
        caption=sweep_notes.paired_caption(collection),
    )


def _references(collection: Collection, group: Group) -> list[Group]:
    """Return what a group is measured by: the baselines, or without any the first label."""
    if not group.runs:
        return []
    found = [baseline(collection, name, group) for name in BASELINES]
    if not any(g.strategy in BASELINES for g in collection.groups):
        found = [collection.group(collection.labels[0], group.point)]
    return [other for other in found if other is not None and other is not group]


def _difference_row(group: Group, other: Group, against: str) -> tuple[Cell, ...]:
    column = Column("difference", "", interval=True, signed=True)
    seeds = len(set(group.seeds) & set(other.seeds))
    return (
        *point_cells(group.point),
        plain_cell(group.label),
        plain_cell(against),
        estimate_cell(column, measures.difference(group, other)),
        estimate_cell(column, measures.difference_t(group, other)),
        Cell(str(seeds), seeds),
    )


def _against(collection: Collection, group: Group, name: str, kind: str) -> Cell:
    column = Column("difference", "", interval=True, signed=True)
    other = baseline(collection, name, group) if group.runs else None
    if other is None:
        return Cell("–")
    measure = measures.difference if kind == BOOTSTRAP else measures.difference_t
    return estimate_cell(column, measure(group, other))


def _difference_heading(name: str, kind: str, *, paper: bool) -> Heading:
    key = f"vs_{name.replace('-', '_')}{'' if kind == BOOTSTRAP else '_t'}"
    return Heading(key, f"vs {name} ({kind})", "estimate", paper)


def _failed(group: Group) -> Cell:
    return Cell(group.missing[0].state if group.missing else "–")


def _key(value: Value) -> tuple[str, Value]:
    # True == 1 in Python, but not on an axis.
    return (str(isinstance(value, bool)), value)


def _smoothing(group: Group) -> float:
    return float(group.runs[0].experiment.strategy.options.get("label_smoothing", 0.0))
