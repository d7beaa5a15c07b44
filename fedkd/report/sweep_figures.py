"""All figures of a collection of runs: one list, in the order in which they are read.

Each is drawn once and written as PDF and PNG for papers and as SVG for the page.
"""

from __future__ import annotations

from pathlib import Path

from fedkd.engine.folder import writing
from fedkd.report.charts import (
    attendance,
    costs,
    fairness,
    fidelity,
    hacking,
    outcomes,
    privacy,
    reliability,
    rounds,
    sources,
    traffic,
)
from fedkd.report.charts.canvas import Canvas
from fedkd.report.collection import Collection
from fedkd.report.drawn import Drawn
from fedkd.report.figures import PLOTS
from fedkd.report.measures import Target

CHARTS = (
    rounds.accuracy,
    rounds.bits,
    outcomes.accuracy,
    outcomes.differences,
    fairness.clients,
    outcomes.fairness,
    fairness.worst,
    reliability.reliability,
    fidelity.fidelity,
    hacking.hacking,
    traffic.pareto,
    outcomes.to_target,
    costs.seconds,
    costs.simulated,
    privacy.curves,
    privacy.epsilon,
    outcomes.epsilon,
    attendance.attendance,
    sources.holdings,
    sources.exposure,
)


def draw(collection: Collection, target: Target | None, folder: Path) -> list[Drawn]:
    """Draw every figure that these runs give into ``folder/plots``; without a result there is none.

    Args:
        collection: runs by label and point; groups without a finished run are named in captions.
        target: the accuracy that rounds and bytes are counted up to; None: not counted.
        folder: of the report.

    Raises:
        RunError: the disk is full or not writable.
    """
    canvas = Canvas(collection, target, folder / PLOTS)
    if not canvas.groups:
        return []
    with writing(folder):
        return [drawn for chart in CHARTS for drawn in chart(canvas)]
