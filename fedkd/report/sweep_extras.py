"""The tables beside the results: what is claimed about privacy, tuning, what is missing, time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fedkd.axes import named
from fedkd.metrics.intervals import mean_t
from fedkd.report.claims import Claims, claims, spent
from fedkd.report.collection import Collection, Group, axis_title
from fedkd.report.curves import Curves
from fedkd.report.sheets import Cell, Heading, Sheet, estimate_cell, plain_cell
from fedkd.report.tables import Column
from fedkd.types import Estimate


def privacy(collection: Collection) -> Sheet:
    """Return what is claimed, each sentence once with its labels and points.

    What no claim covers is in the notes.
    """
    found = [(g, _claims(g)) for g in collection.groups]
    claiming = [g for g, c in found if c.sentences]
    said: dict[str, list[Group]] = {}
    for group, claimed in found:
        for _, sentence in claimed.sentences:
            said.setdefault(sentence, []).append(group)
    epsilon = Column("epsilon", "epsilon", bound=True, absent="none")
    rows = []
    for sentence, groups in said.items():
        labels = list(dict.fromkeys(g.label for g in groups))
        everywhere = len(groups) == sum(g.label in labels for g in claiming)
        every = len(groups) == len(claiming) and len(collection.labels) > 1
        rows.append(
            (
                plain_cell("all" if every else ", ".join(labels)),
                plain_cell("" if everywhere else _where(groups)),
                estimate_cell(epsilon, _largest(groups)),
                plain_cell(sentence),
            )
        )
    columns = (
        Heading("label", "label"),
        Heading("where", "where"),
        Heading("epsilon", "epsilon", "estimate"),
        Heading("claim", "claim"),
    )
    notes = _privacy_notes(found)
    caption = "What is claimed about privacy; an epsilon is rounded up, and the largest over seeds."
    return Sheet("privacy", "Privacy", columns, tuple(rows), tuple(notes), caption=caption)


def _claims(group: Group) -> Claims:
    # Runs under way have no claim yet.
    return claims({group.label: [run for run in group.runs if run.summary.get("privacy")]})


def _largest(groups: list[Group]) -> Estimate | None:
    estimates = [spent(group.runs) for group in groups]
    return max((e for e in estimates if e is not None), key=lambda e: e.value, default=None)


def _privacy_notes(found: list[tuple[Group, Claims]]) -> list[str]:
    notes = []
    protected = list(dict.fromkeys(g.label for g, c in found if c.not_covered))
    open_: dict[str, list[str]] = {}
    for group, claimed in found:
        for _, text in claimed.not_covered:
            labels = open_.setdefault(text, [])
            if group.label not in labels:
                labels.append(group.label)
    for text, labels in open_.items():
        only = "" if len(labels) == len(protected) else f" (only: {', '.join(labels)})"
        notes.append(f"Not covered: {text}{only}")
    for group, claimed in found:
        where = f"{group.label} at {_where([group])}" if group.point else group.label
        for who, why in claimed.stopped:
            seed = who.removeprefix(group.label)
            notes.append(f"{where}{seed}: {why}")
    return notes


def tuning(collection: Collection) -> Sheet | None:
    """Return what tuning chose for each label, of how many trials; None where nothing was tuned."""
    table = collection.tuning
    if not table:
        return None
    columns = (
        Heading("label", "label"),
        Heading("trials", "trials", "number"),
        Heading("failed", "failed", "number"),
        Heading("chosen", "chosen"),
        Heading("validation", "validation accuracy", "number"),
    )
    labels: Mapping[str, Any] = table.get("labels", {})
    order = [*(name for name in collection.labels if name in labels), *sorted(labels)]
    rows = []
    for label in dict.fromkeys(order):
        trials = labels[label].get("trials", [])
        failed = sum(trial.get("validation") is None for trial in trials)
        score = labels[label].get("validation")
        rows.append(
            (
                plain_cell(label),
                plain_cell(len(trials)),
                plain_cell(failed),
                plain_cell(_options(labels[label].get("chosen", {}))),
                Cell("–") if score is None else Cell(f"{100 * score:.1f}", float(score)),
            )
        )
    space = [f"{key}: {_space(values)}" for key, values in table.get("space", {}).items()]
    notes = [
        f"Tuned before the sweep with {table.get('method', 'unknown')} search, "
        f"{table.get('trials', 'unknown')} trials for every label, judged by validation accuracy "
        f"on seed {table.get('seed', 'unknown')}, which the sweep does not use.",
        *([f"Searched: {'; '.join(space)}"] if space else []),
    ]
    caption = " ".join(notes)
    return Sheet("tuning", "Tuning", columns, tuple(rows), tuple(notes), caption=caption)


def _options(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={named(value)}" for key, value in chosen.items()) or "as in the file"


def _space(values: Any) -> str:
    if isinstance(values, Mapping):
        return ", ".join(f"{key} {named(value)}" for key, value in values.items())
    return named(values)


def missing(collection: Collection) -> Sheet:
    """Return the runs without a result, with the reason."""
    columns = (
        *(Heading(key, axis_title(key)) for key in collection.axes),
        Heading("label", "label"),
        Heading("seed", "seed", "number"),
        Heading("state", "state"),
        Heading("rounds_done", "rounds done", "number"),
        Heading("reason", "reason"),
    )
    rows = tuple(
        (
            *(plain_cell(value) for value in group.point.values()),
            plain_cell(group.label),
            plain_cell(run.seed),
            plain_cell(run.state),
            plain_cell(run.rounds_done),
            # Tables hold no paths: the same sweep elsewhere gives the same table.
            plain_cell(re.sub(rf"\S*{re.escape(run.folder.name)}", run.folder.name, run.reason)),
        )
        for group in collection.groups
        for run in group.missing
    )
    notes = (
        "The other tables are of what has finished. The same command again goes on with these.",
    )
    return Sheet("missing", "Runs without a result", columns, rows, notes)


def costs(collection: Collection) -> Sheet:
    """Return wall-clock seconds, and simulated time where there is any, of each group."""
    parts: list[tuple[Column, Callable[[Curves], float]]] = [
        (Column("seconds_per_round", "s/round", 1.0, -3), lambda c: _mean(c.seconds)),
        (Column("seconds_train", "s training", 1.0, -3), lambda c: _sum(c.seconds)),
        (Column("seconds_judging", "s judging", 1.0, -3), lambda c: _sum(c.seconds_judging)),
        (Column("simulated", "simulated time", 1.0, -3), lambda c: _sum(c.clock)),
    ]
    columns = (
        *(Heading(key, axis_title(key)) for key in collection.axes),
        Heading("label", "label"),
        *(Heading(column.key, column.title, "estimate") for column, _ in parts),
    )
    points = collection.points()
    rows = [
        (
            *(plain_cell(value) for value in group.point.values()),
            plain_cell(group.label),
            *(estimate_cell(column, _over_seeds(group, of)) for column, of in parts),
        )
        for group in sorted(collection.groups, key=lambda g: points.index(g.point))
        if group.runs
    ]
    notes = (
        "Wall-clock seconds depend on the machine and on what ran beside: mean over seeds. They "
        "are the only numbers here that differ when the same sweep is run again.",
        "Simulated time is that of the participation model, in its own unit.",
    )
    made = Sheet(
        *("costs", "Costs", columns, tuple(rows), notes), block=len(collection.axes), timed=True
    )
    kept = made.without_empty()
    simulated = any(column.key == "simulated" for column in kept.columns)
    return kept if simulated else replace(kept, notes=notes[:1])


def _where(groups: list[Group]) -> str:
    """Return the points of some groups: ``participation ratio 0.1, 0.2``."""
    values: dict[str, dict[str, None]] = {}
    for group in groups:
        for key, value in group.point.items():
            values.setdefault(key, {})[named(value)] = None
    return "; ".join(f"{axis_title(key)} {', '.join(held)}" for key, held in values.items())


def _over_seeds(group: Group, of: Callable[[Curves], float]) -> Estimate | None:
    values = [value for value in map(of, group.curves) if not math.isnan(value)]
    return mean_t(values) if values else None


def _sum(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.sum()) if known.size else math.nan


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan
