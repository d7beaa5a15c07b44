"""How far confidence at the end of runs is from being right, and what chance alone makes of it.

Examples are the independent units of one run's error, seeds those of several runs' errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fedkd.metrics.bins import Bins, bootstrap_over_examples, pooled
from fedkd.metrics.intervals import bootstrap_mean, mean_t
from fedkd.report.collection import Collection, Group
from fedkd.report.rows import finished, heads, point_cells
from fedkd.report.runs import RunView
from fedkd.report.sheets import Heading, Sheet, estimate_cell, plain_cell
from fedkd.report.tables import Column
from fedkd.rng import stream
from fedkd.types import Estimate

ECE = Column("ece", "ECE", interval=True)
COLUMNS = (
    Column("ece", "ECE (over examples)", interval=True),
    Column("ece_t", "ECE (t over seeds)", interval=True),
    Column("ece_floor", "ECE by chance"),
    Column("brier", "Brier", 1.0, 3, interval=True),
    Column("ece_clients", "clients' own ECE", interval=True),
    Column("ece_floor_clients", "own by chance"),
)


def bins(group: Group) -> Bins | None:
    """Return what the headlines of all seeds together have in each bin; None where one has none."""
    found = [run.curves.ends.bins for run in group.runs]
    known = [one for one in found if one is not None]
    return pooled(known) if known and len(known) == len(found) else None


def over_examples(held: Bins, seed: int) -> Estimate:
    """Return the expected calibration error of bins with its interval over examples."""
    return bootstrap_over_examples(held, stream(seed, "report", "ece"))


def sheet(collection: Collection) -> Sheet | None:
    """Return one row for each label at each point that has bins; None where none has."""
    at = heads(collection)
    rows = []
    for group in finished(collection):
        held = bins(group)
        if held is not None:
            own = [estimate_cell(column, found) for column, found in _row(group, held)]
            rows.append((*point_cells(group.point), plain_cell(group.label), *own))
    if not rows:
        return None
    columns = (
        *at,
        Heading("label", "label"),
        *(Heading(c.key, c.title, "estimate", c.key != "ece_floor_clients") for c in COLUMNS),
    )
    title = "Calibration in the last round"
    made = Sheet(
        "calibration", title, columns, tuple(rows), _notes(collection), block=len(at),
        caption=f"{title}: expected calibration error in %, of 15 bins of confidence.",
    )  # fmt: skip
    return made.without_empty()


def _row(group: Group, held: Bins) -> list[tuple[Column, Estimate | None]]:
    several = len(group.runs) > 1
    found = (
        over_examples(held, group.runs[0].seed),
        _over_seeds(group, "ece") if several else None,
        _bare(held.error_if_calibrated(), held.examples),
        _over_seeds(group, "brier"),
        over_clients(group, lambda run: run.curves.ends.ece, "ece"),
        over_clients(group, lambda run: run.curves.ends.ece_floor, "ece-floor"),
    )
    return list(zip(COLUMNS, found, strict=True))


def over_clients(
    group: Group, of: Callable[[RunView], np.ndarray], purpose: str
) -> Estimate | None:
    """Return the mean over clients: t over seeds, of one seed the BCa bootstrap over its clients.

    Seeds without a value are left out; None where all are.
    """
    known = [(run, values[~np.isnan(values)]) for run in group.runs for values in [of(run)]]
    known = [(run, values) for run, values in known if values.size]
    if not known:
        return None
    if len(known) > 1:
        return mean_t([float(values.mean()) for _, values in known])
    [(run, values)] = known
    made = bootstrap_mean(values, stream(run.seed, "report", purpose))
    return replace(made, method=f"{made.method} over clients")


def _over_seeds(group: Group, metric: str) -> Estimate | None:
    entries: Sequence[dict[str, float]] = [run.entry("last") for run in group.runs]
    known = [float(entry[metric]) for entry in entries if metric in entry]
    return mean_t(known) if known and len(known) == len(entries) else None


def _bare(value: float, n: int) -> Estimate:
    return Estimate(value, math.nan, math.nan, n, "")


def _notes(collection: Collection) -> tuple[str, ...]:
    several = any(len(group.runs) > 1 for group in collection.groups)
    notes = [
        "ECE (over examples): of the test examples of all clients (and seeds) together, as the "
        "reliability diagram draws them, in %. Interval: 95 %, basic bootstrap over examples, each "
        "counted as independent: how the error of these very networks would vary with other "
        "examples, not with other clients or seeds. It begins at 0 where a calibrated predictor as "
        "sure as this one has such an error by chance.",
        "By chance: about what such a calibrated predictor has on average. Only what is above it "
        "says something.",
    ]
    if several:
        notes.insert(1, (
            "ECE (t over seeds): the mean of each seed's own error, with Student's t, 95 %. It is "
            "above that of all examples together where seeds err in opposite directions, and "
            "chance adds more to fewer examples."
        ))  # fmt: skip
    notes.append(
        "Clients' own ECE: mean of each client's error on its own test examples, interval "
        f"{'over seeds (t)' if several else 'over clients (BCa bootstrap)'}. Most of it is chance "
        "where clients have few examples: read it beside the mean of what chance gives them."
    )
    return tuple(notes)
