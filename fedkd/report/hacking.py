"""Whether students go on learning their teacher's errors where one public pool is distilled again.

The proxy is the distillation loss on the pool, the golden loss the negative log-likelihood of test
data; :mod:`fedkd.metrics.hacking` says what is made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedkd.metrics.hacking import Hacking, proxy_golden
from fedkd.report.collection import Collection, Group
from fedkd.report.ends import CLIENTS
from fedkd.report.rows import finished, heads, point_cells
from fedkd.report.runs import RunView
from fedkd.report.sheets import Cell, Heading, Sheet, estimate_cell, plain_cell
from fedkd.report.tables import Column
from fedkd.rng import stream
from fedkd.types import Estimate

FEWEST = 6
"""Rounds that a curve needs; fewer say nothing of a bend or a turn."""
YES, NO, ALONE = "hacked", "no sign of it", "one seed cannot tell"
HONEST = (
    "The proxy is measured on the very examples of the pool that are taught, while they are "
    "taught, not on held-out ones; and the targets are made anew in every round. So a proxy that "
    "falls while the test loss rises can be memory of the pool, or clients that fit their own data "
    "too closely, as well as a teacher whose errors are learned."
)


@dataclass(frozen=True, eq=False)
class Checkpoints:
    """Losses by round and seed: ``proxy`` and ``golden`` (S, T), ``rounds`` (T,), all above 0.

    ``skipped`` rounds have a loss that is not, or is not finite.
    """

    rounds: np.ndarray
    proxy: np.ndarray
    golden: np.ndarray
    skipped: int

    @property
    def enough(self) -> bool:
        """Whether there are rounds enough for a verdict."""
        return len(self.rounds) >= FEWEST


def checkpoints(group: Group) -> Checkpoints | None:
    """Return the losses of the rounds that all seeds have; None unless there are two or more.

    Of several models of the server the proxy is the mean over those of the round.
    """
    pairs = [_losses(run) for run in group.runs]
    if not pairs or not all(pairs):
        return None
    rounds = sorted(set.intersection(*(set(one) for one in pairs)))
    if len(rounds) < 2:
        return None
    table = np.array([[one[t] for t in rounds] for one in pairs])
    kept = (np.isfinite(table) & (table > 0)).all(axis=(0, 2))
    found = table[:, kept]
    return Checkpoints(np.array(rounds)[kept], found[..., 0], found[..., 1], int((~kept).sum()))


def _losses(run: RunView) -> dict[int, tuple[float, float]]:
    """Return proxy and golden loss by round, where a run has both."""
    ends = run.curves.ends
    proxy = mean_by_round(ends.proxy)
    return {t: (proxy[t], ends.golden[t]) for t in proxy if t in ends.golden}


def mean_by_round(proxies: Mapping[str, Mapping[int, float]]) -> dict[int, float]:
    """Return the mean of several series of losses over those that have the round."""
    rounds = sorted({t for series in proxies.values() for t in series})
    return {t: float(np.mean([s[t] for s in proxies.values() if t in s])) for t in rounds}


def judged(found: Checkpoints, seed: int) -> Hacking | str:
    """Return what the curves show, or why they show nothing."""
    if not found.enough:
        return f"too few rounds ({len(found.rounds)} of {FEWEST})"
    for table, what in ((found.proxy, "distillation loss"), (found.golden, "test loss")):
        if np.ptp(np.log(table).mean(axis=0)) < 1e-12:
            return f"the {what} is the same in all rounds"
    rng = stream(seed, "report", "hacking")
    return proxy_golden(found.rounds, found.proxy, found.golden, rng)


def verdict(found: Hacking | str) -> str:
    """Return what is said of a curve."""
    if isinstance(found, str):
        return found
    return ALONE if found.hacked is None else YES if found.hacked else NO


def student(group: Group) -> str:
    """Return who is taught on the pool: the clients, or models of the server."""
    names = sorted({name for run in group.runs for name in run.curves.ends.proxy})
    return "clients" if CLIENTS in names else f"server: {', '.join(names)}"


def sheet(collection: Collection) -> Sheet | None:
    """Return the verdict on every label that distils on a pool in two rounds or more."""
    at = heads(collection)
    found = [(group, checkpoints(group)) for group in finished(collection)]
    known = [(group, held) for group, held in found if held is not None]
    if not known:
        return None
    left_out = any(held.skipped for _, held in known)
    rows = [
        (
            *point_cells(group.point),
            plain_cell(group.label),
            *_row(group, held),
            *([Cell(str(held.skipped), held.skipped)] if left_out else []),
        )
        for group, held in known
    ]
    columns = (
        *at,
        Heading("label", "label"),
        Heading("student", "student"),
        Heading("verdict", "verdict"),
        Heading("checkpoints", "judged rounds", "number"),
        *(Heading(c.key, c.title, "estimate", c.key in PAPER) for c in COLUMNS),
        *([Heading("left_out", "rounds left out", "number", paper=False)] if left_out else []),
    )
    notes = _notes(collection)
    title = "Teacher hacking on the public pool"
    return Sheet("hacking", title, columns, tuple(rows), notes, block=len(at),
                 caption=f"{title}. {notes[0]}").without_empty()  # fmt: skip


COLUMNS = (
    Column("turning", "least test loss in round", 1.0, 0, interval=True),
    Column("rise", "rise of the test loss since", 1.0, 3, interval=True),
    Column("fall", "fall of the proxy since", 1.0, -3, interval=True),
    Column("convergence", "slope of proxy over rounds", 1.0, 2, interval=True),
    Column("bend", "bends in round", 1.0, 0),
    Column("transfer", "slope of test loss over proxy", 1.0, 2, interval=True),
)
PAPER = ("turning", "rise", "fall")


def _row(group: Group, held: Checkpoints) -> list[Cell]:
    found = judged(held, group.runs[0].seed)
    lead = [plain_cell(student(group)), plain_cell(verdict(found))]
    count = [Cell(str(len(held.rounds)), len(held.rounds))]
    if isinstance(found, str):
        return [*lead, *count, *(Cell("–") for _ in COLUMNS)]
    bend = found.convergence.bend
    values = (
        found.turning, found.rise, found.fall, found.convergence.slope,
        None if math.isnan(bend) else Estimate(bend, math.nan, math.nan, len(held.proxy), ""),
        found.transfer.slope,
    )  # fmt: skip
    pairs = zip(COLUMNS, values, strict=True)
    return [*lead, *count, *(estimate_cell(c, v) for c, v in pairs)]


def _notes(collection: Collection) -> tuple[str, ...]:
    return (
        "Proxy: distillation loss on the public pool, mean over the clients (or the server's "
        "models) that are taught in a round; test loss: negative log-likelihood of the headline "
        "on the clients' own test data at the end of that round, mean over clients.",
        HONEST,
        f"{YES!r}: after the round in which the test loss is least it rises while the proxy still "
        f"falls, both with their whole 95 % interval over seeds (Student's t); {ALONE!r} that from "
        f"noise. At least {FEWEST} judged rounds with losses above 0 are needed; others are left "
        "out. Rise and fall of a seed are counted from the round that is best for the other seeds.",
        "Slopes are of straight lines through the logarithms, power laws, up to the round in which "
        "the first bends. The round of the least test loss has a percentile bootstrap over seeds.",
    )
