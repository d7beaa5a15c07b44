"""Every client of every run, small enough to travel inside the page.

Accuracies are whole numbers of 0.1 %, two characters each; who took part is one bit a round and
client. Where that would still be too much the page holds the first seed only, then fewer rounds,
and says so.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedkd.engine.setup import gather
from fedkd.errors import ConfigError, DataError
from fedkd.report.collection import Collection
from fedkd.report.page.parts import Table, table
from fedkd.report.page.setting import at, runs_of, safe_json

if TYPE_CHECKING:
    from fedkd.report.curves import Curves
    from fedkd.report.runs import RunView

SIGNS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
NOTHING = 64 * 64 - 1
BUDGET = 1_300_000
"""Characters; figures and tables need the rest of the 3 MB of a page."""
MANY_CLASSES = 200


@dataclass(frozen=True)
class Holding:
    """Who trains on what: ``counts (clients, classes)`` and what the classes are called."""

    counts: np.ndarray
    names: tuple[str, ...]


def holdings(collection: Collection) -> dict[str, Holding]:
    """Return who holds what by :func:`key` of a run, once for each division of the data.

    Left out: data that are no longer at hand, text (whose rows have no class), too many classes.
    """
    found: dict[str, Holding] = {}
    tried: set[str] = set()
    for run in runs_of(collection):
        if key(run) in tried:
            continue
        tried.add(key(run))
        try:
            federation, _, _ = gather(run.experiment)
        except (DataError, ConfigError):
            continue
        names = federation.dataset.class_names
        if not federation.task.sequence and federation.task.classes <= MANY_CLASSES:
            counts = federation.counts()
            names = names or tuple(map(str, range(counts.shape[1])))
            found[key(run)] = Holding(counts, tuple(names))
    return found


def key(run: RunView) -> str:
    """Return what decides who holds what."""
    return json.dumps([run.data, run.seed, run.experiment.table().get("canaries")])


def encoded(accuracy: np.ndarray) -> str:
    """Return shares as text, two characters of 64 signs each: 1000 times the share, rounded.

    >>> encoded(np.array([0.0, 0.5, 1.0, np.nan]))
    'AAH0Po__'
    """
    flat = np.asarray(accuracy, dtype=float).ravel()
    whole = np.where(np.isnan(flat), NOTHING, np.rint(1000 * np.nan_to_num(flat))).astype(int)
    both = np.stack([whole // 64, whole % 64], axis=1).ravel()
    return np.array(list(SIGNS))[both].astype("U1").tobytes().decode("utf-32-le")


def bits(values: np.ndarray) -> str:
    """Return a table of booleans as base64, a bit each, row by row, the highest first."""
    return base64.b64encode(np.packbits(values.ravel()).tobytes()).decode("ascii")


def island(
    collection: Collection, held: dict[str, Holding], budget: int = BUDGET
) -> tuple[str, tuple[str, ...]]:
    """Return the JSON of the drill-down and what a reader has to know about it; "" without runs."""
    shown = [
        (group.label, group.point, list(zip(group.runs, group.curves, strict=True)))
        for group in collection.groups
        if group.runs
    ]
    notes: list[str] = []
    if sum(_size(c) for _, _, runs in shown for _, c in runs) > budget:
        shown = [(label, point, runs[:1]) for label, point, runs in shown]
        notes.append("To keep this page small it holds the clients of the first seed only.")
    size = sum(_size(c) for _, _, runs in shown for _, c in runs)
    stride = -(-size // budget) if size > budget else 1
    if stride > 1:
        notes.append(f"Of the judged rounds every {stride}. and the last are shown.")
    made = _Tables()
    points = collection.points()
    entries = [
        {
            "l": collection.labels.index(label),
            "p": points.index(point),
            "s": run.seed,
            **_run(run, curves, held, made, stride),
        }
        for label, point, runs in shown
        for run, curves in runs
        if len(curves.rounds)
    ]
    if not entries:
        return "", ()
    return safe_json({
        "labels": list(collection.labels),
        "points": [at(point) or "all" for point in points],
        "rounds": made.rounds,
        "examples": made.examples,
        "holdings": made.holdings,
        "runs": entries,
    }), tuple(notes)  # fmt: skip


class _Tables:
    """Lists that many runs share, each held once."""

    def __init__(self) -> None:
        self.rounds: list[Any] = []
        self.examples: list[Any] = []
        self.holdings: list[Any] = []
        self._at: dict[str, int] = {}

    def place(self, name: str, value: Any) -> int:
        rows: list[Any] = getattr(self, name)
        text = name + json.dumps(value)
        if text not in self._at:
            self._at[text] = len(rows)
            rows.append(value)
        return self._at[text]


def _run(
    run: RunView, curves: Curves, held: dict[str, Holding], made: _Tables, stride: int
) -> dict[str, Any]:
    # Counted from the end, so that the last round stays.
    kept = sorted(range(len(curves.rounds) - 1, -1, -stride))
    examples = [None if np.isnan(n) else int(n) for n in curves.examples]
    entry = {
        "k": curves.clients,
        "r": made.place("rounds", curves.rounds[kept].tolist()),
        "t": made.place("rounds", curves.played.tolist()),
        "e": made.place("examples", examples),
        "a": encoded(curves.accuracy[kept]),
        "b": bits(curves.took_part),
    }
    if curves.lost.any():
        entry["x"] = bits(curves.lost)
    holding = held.get(key(run))
    if holding is not None:
        value = {"names": list(holding.names), "counts": holding.counts.tolist()}
        entry["h"] = made.place("holdings", value)
    return entry


def _size(curves: Curves) -> int:
    masks = 1 + bool(curves.lost.any())
    return 2 * curves.accuracy.size + masks * curves.took_part.size // 6 + 80


def holding_tables(collection: Collection, held: dict[str, Holding]) -> tuple[Table, ...]:
    """Return the first division of the data as a table: the figure's numbers."""
    first = next((run for run in runs_of(collection) if key(run) in held), None)
    if first is None:
        return ()
    holding = held[key(first)]
    rows: Sequence[Sequence[str]] = [
        (str(k), str(row.sum()), str((row > 0).sum()), *map(str, row))
        for k, row in enumerate(holding.counts)
    ]
    titles = ("client", "examples", "classes", *holding.names)
    title = f"Training examples by client and class, seed {first.seed}"
    note = "Validation examples are not counted. Other seeds are divided in the same way, anew."
    return (table("holdings", title, titles, rows, (note,), folded=True),)
