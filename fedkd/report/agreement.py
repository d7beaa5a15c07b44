"""How far students answer as their teachers, and whether that goes with accuracy.

A student can gain without following its teacher, and follow it without gaining: agreement is
measured beside accuracy and never instead of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from fedkd.metrics.intervals import mean_t
from fedkd.report.calibration import over_clients
from fedkd.report.collection import Collection, Group
from fedkd.report.rows import finished, heads, point_cells
from fedkd.report.runs import RunView
from fedkd.report.sheets import Cell, Heading, Sheet, estimate_cell, plain_cell
from fedkd.report.tables import Column
from fedkd.types import Estimate

FEWEST = 3
"""Points that a correlation needs."""
ACCURACY = Column("accuracy", "user accuracy, last round", interval=True)
TOP1 = Column("top1", "same answer", interval=True)
OTHERS = (
    Column("kl", "KL in nats", 1.0, 3, interval=True),
    Column("tau", "Kendall's tau", 1.0, 3, interval=True),
    Column("loyalty", "probability loyalty", 1.0, 3, interval=True),
    Column("cka", "CKA of outputs", 1.0, 3, interval=True),
)
WORST, BEST = Column("worst", "worst client"), Column("best", "best client")


@dataclass(frozen=True)
class Student:
    """Whose agreement a row is of: the clients', at one taught point, or a model's of the server.

    ``point`` is empty for a network as a whole, ``model`` for the clients.
    """

    point: str = ""
    model: str = ""

    def __str__(self) -> str:
        if self.model:
            return f"server: {self.model}"
        return f"clients, at {self.point}" if self.point else "clients"

    def of(self, run: RunView, measure: str) -> np.ndarray:
        """Return what a run has of a measure: (K,) of clients, (1,) of the server, or nothing."""
        ends = run.curves.ends
        if self.model:
            found = ends.students.get((measure, self.model))
            return np.zeros(0) if found is None else np.array([found])
        name = f"{measure}@{self.point}" if self.point else measure
        return ends.agreement.get(name, np.zeros(0))


def students(group: Group) -> list[Student]:
    """Return whose agreement the runs of a group have, the clients first."""
    ends = [run.curves.ends for run in group.runs]
    points = sorted({point for one in ends for point in one.points()})
    models = sorted({model for one in ends for _, model in one.students})
    return [*(Student(point) for point in points), *(Student("", model) for model in models)]


def overall(group: Group) -> Estimate | None:
    """Return how often clients answer as their teachers, mean over taught points and clients.

    Of methods that teach the server's models alone it is the mean over those. None where nobody is
    taught.
    """
    found = over_clients(group, lambda run: run.curves.ends.followed(), "agreement")
    return found or _over_seeds(group, _students, np.mean)


def served(group: Group) -> bool:
    """Return whether :func:`overall` is of models of the server, as no client is taught."""
    return all(not run.curves.ends.followed().size for run in group.runs)


def accuracy(group: Group) -> Estimate | None:
    """Return the user accuracy of the last judged round, which agreement is of as well."""
    return over_clients(group, last, "bootstrap")


def last(run: RunView) -> np.ndarray:
    """Return each client's accuracy (K,) in the last judged round."""
    return run.curves.by_client(1) if len(run.curves.rounds) else np.zeros(0)


def sheet(collection: Collection) -> Sheet | None:
    """Return the agreement of every student that was taught by soft targets; None without any."""
    at = heads(collection)
    rows = [
        (*point_cells(group.point), plain_cell(group.label), *_row(group, student))
        for group in finished(collection)
        for student in students(group)
    ]
    if not rows:
        return None
    columns = [*at, Heading("label", "label"), Heading("student", "student")]
    columns += [Heading(c.key, c.title, "estimate") for c in (ACCURACY, TOP1)]
    columns += [Heading(c.key, c.title, "estimate", paper=False) for c in (WORST, BEST)]
    columns += [Heading(c.key, c.title, "estimate") for c in OTHERS]
    columns += [Heading("clients", "clients taught", "number", paper=False)]
    title = "Agreement with the teacher"
    return Sheet(
        "agreement", title, tuple(columns), tuple(rows), _notes(collection), block=len(at),
        caption=f"{title}, and user accuracy. {_intervals(collection)}",
    ).without_empty()  # fmt: skip


def _row(group: Group, student: Student) -> list[Cell]:
    def of(measure: str) -> Callable[[RunView], np.ndarray]:
        return lambda run: student.of(run, measure)

    cells = [plain_cell(str(student)), estimate_cell(ACCURACY, accuracy(group))]
    cells.append(estimate_cell(TOP1, over_clients(group, of("top1"), "agreement")))
    for column, end in ((WORST, np.nanmin), (BEST, np.nanmax)):
        found = None if student.model else _over_seeds(group, of("top1"), end)
        cells.append(estimate_cell(column, found))
    cells += [estimate_cell(c, over_clients(group, of(c.key), "agreement")) for c in OTHERS]
    return [*cells, _taught(group, student)]


def _over_seeds(
    group: Group, of: Callable[[RunView], np.ndarray], reduce: Callable[[np.ndarray], float]
) -> Estimate | None:
    known = [found for found in map(of, group.runs) if (~np.isnan(found)).any()]
    return mean_t([float(reduce(found[~np.isnan(found)])) for found in known]) if known else None


def _taught(group: Group, student: Student) -> Cell:
    """Return how many clients were taught in the last round, of how many; a span over seeds."""
    if student.model:
        return Cell()
    counts = sorted(int((~np.isnan(student.of(r, "top1"))).sum()) for r in group.runs)
    span = "–".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    return Cell(f"{span} of {group.runs[0].curves.clients}", counts[0])


def _students(run: RunView) -> np.ndarray:
    found = run.curves.ends.students
    return np.array([value for (measure, _), value in found.items() if measure == "top1"])


@dataclass(frozen=True)
class Pair:
    """One correlation of agreement with accuracy at a point: over what, and how many of them."""

    group: Group
    over: str
    units: str
    found: Estimate


def together(collection: Collection) -> Sheet | None:
    """Return how agreement goes with accuracy, over labels and over the clients of each."""
    at = heads(collection)
    column = Column("correlation", "Spearman's correlation", 1.0, 2, interval=True)
    rows = [
        (
            *point_cells(pair.group.point),
            plain_cell(pair.over),
            plain_cell(pair.units),
            estimate_cell(column, pair.found),
        )
        for pair in _pairs(collection)
    ]
    columns = (
        *at,
        Heading("label", "over"),
        Heading("units", "points"),
        Heading(column.key, column.title, "estimate"),
    )
    notes = (
        "Correlation of agreement with the teacher (same answer) and accuracy on test data, both "
        "of the last round, from -1 to 1; at least 3 points. 95 % intervals: over labels, and over "
        "the clients of one seed, of Bonett and Wright, from 4 points on; of several seeds "
        "Student's t over each seed's correlation over clients, cut at -1 and 1. A single "
        "correlation of 1 or -1 has no interval.",
        "Agreement rises with accuracy by itself where teachers are right: a correlation is no "
        "proof that following the teacher made the student better. Labels share data and seeds, "
        "so that they count for fewer points than they are; one whose server's models alone are "
        "taught stands with these.",
    )
    title = "Generalization and fidelity"
    return Sheet("fidelity", title, columns, tuple(rows), notes, block=len(at),
                 caption=f"{title}: {notes[0]}") if rows else None  # fmt: skip


def _pairs(collection: Collection) -> Iterator[Pair]:
    for point in collection.points():
        here = [g for g in finished(collection) if g.point == point]
        both = [(g, overall(g), accuracy(g)) for g in here]
        known = [(g, a.value, b.value) for g, a, b in both if a is not None and b is not None]
        found = correlation([a for _, a, _ in known], [b for *_, b in known])
        if found is not None:
            yield Pair(known[0][0], "labels", f"{len(known)} labels", found)
        for group in here:
            over = within(group)
            if over is not None:
                yield Pair(group, f"clients of {group.label}", _units(group), over)


def _units(group: Group) -> str:
    counts = sorted({len(pairs(run)) for run in group.runs})
    span = "–".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    return f"{span} clients" + (f", {len(group.runs)} seeds" if len(group.runs) > 1 else "")


def within(group: Group) -> Estimate | None:
    """Return the correlation over a label's clients: mean over seeds, or of its one seed."""
    tables = [pairs(run) for run in group.runs]
    found = [correlation(list(t[:, 0]), list(t[:, 1])) for t in tables]
    known = [one for one in found if one is not None]
    if len(known) < 2:
        return known[0] if known else None
    made = mean_t([one.value for one in known])
    # Student's t knows nothing of the bounds of a correlation.
    return replace(made, low=max(-1.0, made.low), high=min(1.0, made.high))


def pairs(run: RunView) -> np.ndarray:
    """Return agreement and accuracy (n, 2) of the clients of a run that have both."""
    followed, right = run.curves.ends.followed(), last(run)
    if not followed.size or not right.size:
        return np.zeros((0, 2))
    both = np.column_stack([followed, right])
    return both[~np.isnan(both).any(axis=1)]


def correlation(a: list[float], b: list[float]) -> Estimate | None:
    """Return Spearman's correlation of at least 3 pairs that differ in both; else None."""
    from fedkd.metrics.fidelity import rank_correlation

    if len(a) < FEWEST or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return rank_correlation(a, b)


def _intervals(collection: Collection) -> str:
    if any(len(group.runs) > 1 for group in collection.groups):
        return "Intervals: 95 %, Student's t over seeds, of one seed BCa bootstrap over clients."
    return "Intervals: 95 %, BCa bootstrap over the clients of one seed."


def _notes(collection: Collection) -> tuple[str, ...]:
    return (
        "Clients: mean over the clients that soft targets taught in the last round, on the "
        "examples that they were taught on: each network as that training left it, against "
        "the targets. Same answer, worst and best client (mean over seeds) in %; KL(teacher || "
        "student): 0 is the same; Kendall's tau of the classes' order, loyalty (1 less the root of "
        "the Jensen-Shannon divergence), CKA: 1 is the same.",
        f"{_intervals(collection)} Models of the server have none over clients: each is one.",
        "Agreement on examples that are taught says how well a student learned its targets, not "
        "whether these are right.",
    )
