"""Figures that other modules draw, of the data and of audits, as figures of a report."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fedkd.engine.setup import gather
from fedkd.errors import DataError
from fedkd.report.charts.canvas import Canvas, slug, where
from fedkd.report.drawn import Drawn
from fedkd.report.runs import RunView

MOST = 4
AUDIT = "audit.json"


def holdings(canvas: Canvas) -> Iterator[Drawn]:
    """Draw who trains on what, once for each division of the data, of its first seed.

    It is left out where the data are no longer at hand.
    """
    from fedkd.data.preview import plot_holdings

    firsts: dict[str, RunView] = {}
    for run in (run for group in canvas.groups for run in group.runs):
        if run.data not in firsts or run.seed < firsts[run.data].seed:
            firsts[run.data] = run
    number = 0
    for run in list(firsts.values())[:MOST]:
        try:
            federation, _, _ = gather(run.experiment)
        except DataError:
            continue
        name = f"data-{number}" if len(firsts) > 1 else "data"
        data = run.experiment.data
        title = f"{data.source.name}, {data.manifest or data.partition.name}"
        plot_holdings(federation, canvas.folder / name, f"{title}, seed {run.seed}")
        number += 1
        left = f" {len(firsts) - MOST} further divisions are not drawn." * (len(firsts) > MOST)
        caption = f"Training examples of each client, of seed {run.seed}; others differ.{left}"
        yield canvas.drawn(name, f"Who has what: {title}", caption, "data")


def exposure(canvas: Canvas) -> Iterator[Drawn]:
    """Draw exposure and its trade-off with quality at every point with audits, at most four."""
    from fedkd.report import audit_figures
    from fedkd.report.audit_tables import lines

    made = 0
    for point in canvas.collection.points():
        groups = [g for g in canvas.groups if g.point == point]
        files = [run.folder / AUDIT for g in groups for run in g.runs]
        results = [json.loads(f.read_text(encoding="utf-8")) for f in files if f.is_file()]
        if not results or made == MOST:
            continue
        made += 1
        at = f" at {where(point)}" if point else ""
        for kind, draw, title in (
            ("exposure", audit_figures.exposure, "Exposure of canaries"),
            ("trade-off", audit_figures.trade_off, "Exposure against quality"),
        ):
            name = "-".join(filter(None, (kind, slug(where(point)))))
            if draw(lines(results), canvas.folder / name):
                caption = (
                    f"From the audits of {len(results)} of {len(files)} runs{at}. A low exposure "
                    "says that this attack found no more, never that no more leaks."
                )
                yield canvas.drawn(name, f"{title}{at}", caption, "exposure")
