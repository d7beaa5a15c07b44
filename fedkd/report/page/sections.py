"""Which figures and tables stand where, and what the page says around them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedkd.axes import named
from fedkd.errors import DataError
from fedkd.report.claims import claims
from fedkd.report.collection import Collection, axis_title
from fedkd.report.drawn import Drawn
from fedkd.report.page import drawing, drill, parts, setting
from fedkd.report.page.parts import Bullets, Live, PageContent, Section, Status, Table, table
from fedkd.report.sheets import Cell, Sheet

if TYPE_CHECKING:
    from fedkd.report.measures import Target
    from fedkd.report.runs import RunView

TITLES = {
    "headline": "Results",
    "accuracy": "Accuracy by round",
    "axis": "Accuracy against what varies",
    "differences": "Differences, paired",
    "fairness": "Fairness over clients",
    "teachers": "Students and teachers",
    "traffic": "Bytes against accuracy",
    "costs": "Time",
    "privacy": "Privacy",
    "exposure": "What is remembered",
    "data": "Who holds what",
    "clients": "Single clients",
    "tuning": "Tuning budget",
}
OPEN = "Not covered: "
SAME = {"time": "costs", "rounds": "accuracy", "holdings": "data", "labels": "data"}
OF_SHEETS = {
    "rounds": "traffic",
    "target": "traffic",
    "traffic": "traffic",
    "bytes": "traffic",
    "costs": "costs",
    "seconds": "costs",
    "time": "costs",
    "differences": "differences",
    "paired": "differences",
    "fairness": "fairness",
    "calibration": "accuracy",
    "agreement": "teachers",
    "fidelity": "teachers",
    "hacking": "teachers",
    "privacy": "privacy",
    "epsilon": "privacy",
    "tuning": "tuning",
    "exposure": "exposure",
    "failures": "missing",
    "missing": "missing",
}


def content(
    collection: Collection,
    sheets: Sequence[Sheet],
    drawn: Sequence[Drawn],
    commands: Sequence[str],
    target: Target | None,
    live: Live | None = None,
) -> PageContent:
    """Return all that the page says.

    Raises:
        DataError: a figure or an audit that lies in the folders is damaged.
    """
    held = drill.holdings(collection)
    island, thinned = drill.island(collection, held)
    figures: dict[str, list[parts.Figure]] = {}
    for i, one in enumerate(drawn):
        place = SAME.get(one.section, one.section)
        figures.setdefault(place if place in TITLES else "headline", []).append(
            drawing.figure(one, i)
        )
    tables: dict[str, list[Table]] = {}
    for sheet in sheets:
        tables.setdefault(_place(sheet), []).append(_table(sheet))
    made = [setting.setting(collection, target)]
    for id_, title in TITLES.items():
        shown = tuple(tables.get(id_, ()))
        drawings = tuple(figures.get(id_, ()))
        against = f"Accuracy against {setting.listed(map(axis_title, collection.axes))}"
        name = against if id_ == "axis" and collection.axes else title
        section = Section(id_, name, tables=shown, figures=drawings)
        made.append(_with_more(section, collection, held, island, thinned))
    made.append(setting.reproduction(collection, commands))
    made.append(missing(collection, tuple(tables.get("missing", ()))))
    return PageContent(
        name=collection.name,
        subtitle=_counted(collection),
        sections=tuple(s for s in made if not s.empty),
        island=island,
        status=status(collection) if live else None,
        live=live,
    )


def _with_more(
    section: Section,
    collection: Collection,
    held: Mapping[str, drill.Holding],
    island: str,
    thinned: tuple[str, ...],
) -> Section:
    """Return a section with what is not a figure or a table of others."""
    more: dict[str, object] = {}
    if section.id == "privacy":
        said = _privacy(collection)
        if not said:
            return Section(section.id, section.title)
        # A table of claims says them already; what is open stands below it, each item once.
        more = {"bullets": said[1:] if section.tables else said}
        more["tables"] = tuple(map(_without_open, section.tables))
    elif section.id == "exposure":
        more = {"tables": (*section.tables, *_exposure(collection))}
    elif section.id == "data":
        more = {"tables": (*section.tables, *drill.holding_tables(collection, dict(held)))}
    elif section.id == "clients" and island:
        more = {"drill": True, "paragraphs": thinned}
    elif section.id == "tuning" and collection.tuning and not section.tables:
        more = {"tables": _tuning(collection.tuning)}
    return Section(**{**section.__dict__, **more}) if more else section


def _place(sheet: Sheet) -> str:
    words = sheet.name.lower().replace("_", "-").split("-")
    return next((OF_SHEETS[word] for word in words if word in OF_SHEETS), "headline")


def _table(sheet: Sheet) -> Table:
    """Return a sheet as the page shows it: labels first, as they stay in view when it scrolls."""
    order = sorted(range(len(sheet.columns)), key=lambda i: sheet.columns[i].key != "label")
    columns = [sheet.columns[i] for i in order]
    breaks = (i for i in range(1, len(sheet.rows)) if sheet.block_of(i) != sheet.block_of(i - 1))
    return Table(
        f"table-{drawing.slug(sheet.name)}",
        sheet.title,
        tuple(column.title for column in columns),
        tuple(tuple(_cell(row[i]) for i in order) for row in sheet.rows),
        sheet.notes or tuple(filter(None, (sheet.caption,))),
        tuple(i for i, column in enumerate(columns) if i == 0 or column.kind == "text"),
        breaks=tuple(breaks),
    )


def _cell(given: Cell) -> parts.Cell:
    """Return a cell with what its interval is, which shows when the pointer rests on it."""
    sort, found = given.sort, given.estimate
    how = "" if found is None else ", ".join(filter(None, (found.method, f"n = {found.n}")))
    key = f"{sort:.12g}" if isinstance(sort, float) else sort.strip("–")
    return parts.Cell(given.text, given.best, key, how)


def _privacy(collection: Collection) -> tuple[Bullets, ...]:
    runs: dict[str, list[RunView]] = {}
    for group in collection.groups:
        # Of runs under way nothing can be claimed yet.
        done = [run for run in group.runs if run.summary.get("privacy")]
        where = setting.at(group.point)
        runs[f"{group.label} ({where})" if where else group.label] = done
    if not any(run.ledger for found in runs.values() for run in found):
        return ()
    said = claims(runs)
    made = [Bullets("What is claimed", tuple(said.lines()))]
    if said.not_covered:
        made.append(Bullets("What no epsilon here covers", tuple(said.open_lines())))
    return tuple(made)


def _without_open(given: Table) -> Table:
    return replace(given, notes=tuple(n for n in given.notes if not n.startswith(OPEN)))


def _exposure(collection: Collection) -> list[Table]:
    """Return the tables of the audits that lie beside the runs, for each point."""
    from fedkd.report import audit_tables

    made: list[Table] = []
    for i, point in enumerate(collection.points()):
        results = []
        for group in (g for g in collection.groups if g.point == point):
            for run in group.runs:
                file = run.folder / "audit.json"
                if not file.is_file():
                    continue
                try:
                    found = json.loads(file.read_text(encoding="utf-8"))
                    found["run"] = {**found["run"], "label": group.label, "seed": run.seed}
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{file} is damaged ({error!r}); make it again with fedkd audit"
                    ) from None
                results.append(found)
        if not results:
            continue
        where = f", {setting.at(point)}" if point else ""
        for make in (
            audit_tables.headline,
            audit_tables.by_level,
            audit_tables.bounds,
            audit_tables.reductions,
        ):
            t = make(results)
            if t.rows:
                id_ = f"audit-{i}-{make.__name__}"
                folded = make is not audit_tables.headline
                made.append(table(id_, t.title + where, t.titles, t.rows, t.notes, folded=folded))
    return made


def _tuning(found: Mapping[str, object]) -> tuple[Table, ...]:
    labels = found.get("labels")
    if not isinstance(labels, Mapping):
        return ()
    rows = [
        (label, str(len(entry["trials"])), named(entry["chosen"]) or "as given")
        for label, entry in labels.items()
    ]
    note = (
        "Every method had the same number of trials. Trials are judged by validation accuracy, on "
        "a seed that no other run here uses."
    )
    return (table("tuning-budget", "Trials", ("method", "trials", "chosen"), rows, (note,)),)


def missing(collection: Collection, tables: tuple[Table, ...] = ()) -> Section:
    """Return the runs without a result, with reasons."""
    rows = [
        (g.label, *map(named, g.point.values()), str(m.seed), m.state, str(m.rounds_done), m.reason)
        for g in collection.groups
        for m in g.missing
    ]
    titles = ("method", *map(axis_title, collection.axes), "seed", "state", "rounds", "reason")
    own = (table("missing-runs", "Runs without a result", titles, rows),) if rows else ()
    return Section("missing", "Missing runs", tables=tables or own)


def status(collection: Collection) -> Status:
    """Return how many runs are where, and what is under way."""
    counts = dict.fromkeys(("failed", "running", "waiting"), 0)
    under_way, reasons = [], []
    unfinished: set[tuple[str, str, int]] = set()
    for group in collection.groups:
        for m in group.missing:
            counts[m.state] += 1
            name = ", ".join(t for t in (group.label, setting.at(group.point)) if t)
            unfinished.add((group.label, setting.at(group.point), m.seed))
            if m.state == "failed":
                reasons.append(f"{name}, seed {m.seed}: {m.reason}")
            elif m.state == "running":
                so_far = m.reason or f"{m.rounds_done} rounds"
                under_way.append(f"{name}, seed {m.seed}: {so_far}")
    finished = sum(
        (group.label, setting.at(group.point), run.seed) not in unfinished
        for group in collection.groups
        for run in group.runs
    )
    return Status(finished, **counts, under_way=tuple(under_way), reasons=tuple(reasons))


def _counted(collection: Collection) -> str:
    found = status(collection)
    done = f"{found.finished} of {found.total}" if found.total > found.finished else found.finished
    return ", ".join(_plural(n, what) for n, what in _amounts(collection, str(done)))


def _amounts(collection: Collection, done: str) -> Iterable[tuple[str, str]]:
    yield str(len(collection.labels)), "method"
    points = len(collection.points())
    if points > 1:
        yield str(points), "point"
    seeds = {s for g in collection.groups for s in (*g.seeds, *(m.seed for m in g.missing))}
    yield str(len(seeds)), "seed"
    yield done, "finished run"


def _plural(count: str, what: str) -> str:
    return f"{count} {what}{'' if count == '1' else 's'}"
