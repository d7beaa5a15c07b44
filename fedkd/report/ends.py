"""What runs say beside accuracy: calibration at the end, agreement with teachers, distillation.

Taken from the records while they are at hand, so that no table or figure reads them again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fedkd.engine.calibration import written
from fedkd.metrics.bins import Bins
from fedkd.metrics.log import Log
from fedkd.types import Record

CLIENTS = ""
"""The student of a proxy that is the clients themselves; others are models of the server."""
AGREEMENT, DIGEST, DISTIL = "agreement/", "loss/digest", "server/distil/"
SERVER = f"server/{AGREEMENT}"


@dataclass(frozen=True, eq=False, kw_only=True)
class Ends:
    """One run's K clients and its server; NaN or empty where nothing was recorded.

    ``bins`` are the headline's test examples of all clients in the last round, ``ece`` and
    ``ece_floor`` (K,) each client's own. ``agreement`` (K,) is by name, ``top1`` or, of several
    taught points of a network, ``top1@POINT``; ``students`` by (measure, model of the server).
    ``proxy`` is the distillation loss on the public pool by student and round, ``golden`` the test
    loss of the headline by judged round; both are means over clients.
    """

    bins: Bins | None = None
    ece: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ece_floor: np.ndarray = field(default_factory=lambda: np.zeros(0))
    agreement: dict[str, np.ndarray] = field(default_factory=dict)
    students: dict[tuple[str, str], float] = field(default_factory=dict)
    proxy: dict[str, dict[int, float]] = field(default_factory=dict)
    golden: dict[int, float] = field(default_factory=dict)

    def points(self) -> list[str]:
        """Return the taught points that agreement is of; ``""`` is a network as a whole."""
        return sorted({name.partition("@")[2] for name in self.agreement})

    def followed(self) -> np.ndarray:
        """Return how often each client (K,) answers as its teacher, mean over its taught points."""
        tables = [v for name, v in self.agreement.items() if name.partition("@")[0] == "top1"]
        if not tables:
            return np.zeros(0)
        seen = ~np.isnan(np.array(tables))
        total = np.where(seen, tables, 0.0).sum(0)
        return np.where(seen.any(0), total / np.maximum(seen.sum(0), 1), np.nan)


def ends(log: Log, readout: str, predict: str) -> Ends:
    """Return what a run says beside accuracy; ``readout`` and ``predict`` are its headline.

    Of agreement the last round that has any counts, for every client and student.
    """
    agreement: dict[str, np.ndarray] = {}
    students: dict[tuple[str, str], float] = {}
    own = {metric: np.full(log.clients, np.nan) for metric in ("ece", "ece_floor")}
    digests: dict[int, list[float]] = {}
    proxy: dict[str, dict[int, float]] = {}
    bins: list[Record] = []
    for r in log.records:
        judged = (r.split, r.readout, r.predict) == ("test", readout, predict)
        if r.metric.startswith("bin_"):
            bins.append(r)
        elif r.client >= 0 and judged and r.metric in own:
            own[r.metric][r.client] = r.value
        elif r.client >= 0 and r.metric.startswith(AGREEMENT):
            name = r.metric.removeprefix(AGREEMENT)
            agreement.setdefault(name, np.full(log.clients, np.nan))[r.client] = r.value
        elif r.client >= 0 and r.metric == DIGEST:
            digests.setdefault(r.round, []).append(r.value)
        elif r.client < 0 and r.metric.startswith(SERVER):
            measure, _, model = r.metric.removeprefix(SERVER).partition("/")
            students[measure, model] = r.value
        elif r.client < 0 and r.metric.startswith(DISTIL):
            proxy.setdefault(r.metric.removeprefix(DISTIL), {})[r.round] = r.value
    if digests:
        proxy[CLIENTS] = {t: float(np.mean(each)) for t, each in digests.items()}
    return Ends(
        bins=written(bins, readout, predict), ece=own["ece"], ece_floor=own["ece_floor"],
        agreement=agreement, students=students, proxy=proxy,
        golden=_golden(log, readout, predict) if proxy else {},
    )  # fmt: skip


def _golden(log: Log, readout: str, predict: str) -> dict[int, float]:
    rounds = log.rounds("accuracy", "own" if readout == "stale" else readout)
    rows = zip(rounds, log.table("loss", "test", readout, predict), strict=True)
    return {t: float(row[~np.isnan(row)].mean()) for t, row in rows if not np.isnan(row).all()}
