"""Reliability diagrams: how often the answers of each bin of confidence are right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedkd.metrics.bins import Bins
from fedkd.report.calibration import ECE, bins, over_examples
from fedkd.report.charts.canvas import Canvas, Rest, seeds
from fedkd.report.charts.rounds import panel_title
from fedkd.report.charts.sheet import outer, sheet
from fedkd.report.collection import Group
from fedkd.report.drawn import Drawn

FEWEST = 10
"""Examples that a bin needs: with fewer its interval covers nearly everything."""
MOST = 6
"""Diagrams whose errors the caption names."""


def reliability(canvas: Canvas) -> Iterator[Drawn]:
    """Draw accuracy against confidence at the end, one panel for each value of the main axis."""
    main = canvas.main

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        values, left = canvas.panels(main, rest)
        held = {v: [(g, bins(g)) for g in canvas.at(main, v, rest)] for v in values}
        known = [(g, own) for found in held.values() for g, own in found if own is not None]
        groups = [g for g, _ in known]
        if not groups:
            return None
        with sheet(canvas.folder / name, len({g.label for g in groups}) + 1, len(values)) as made:
            for axes, value in zip(made.panels, values, strict=True):
                (drawn,) = axes.plot([0, 100], [0, 100], color="#777777", linewidth=0.8, zorder=1)
                if not made.notes:
                    made.notes.append((drawn, "as often right as sure"))
                for group, own in held[value]:
                    if own is None:
                        continue
                    k, found = canvas.number(group.label), own.reliability()
                    some = np.flatnonzero(own.counts >= FEWEST)
                    x, y, low, high = (
                        100 * column[some]
                        for column in (found.confidence, found.accuracy, found.low, found.high)
                    )
                    made.bars(axes, k, x, low, high)
                    made.line(axes, k, group.label, x, y, marker=True, linewidth=1.0)
                panel_title(axes, main, value)
            outer(made, "mean confidence in %", "right answers in %")
            made.panels[0].set_xlim(-2, 102)
            made.panels[0].set_ylim(-2, 102)
        skipped = f"{left} values in between have no panel." if left else ""
        caption = (
            "Test examples of all clients in the last round, in 15 bins of the probability of the "
            f"answer, pooled over {seeds(groups)}. Below the grey line: surer than right. Bars: "
            "Clopper-Pearson 95 %, each bin for itself and each example counted as independent; "
            f"bins of fewer than {FEWEST} examples are not drawn. {_errors(known)} {skipped}"
        )
        return canvas.drawn(name, "Reliability", f"{caption} {end}", "accuracy")

    yield from canvas.each(main, one, "reliability")


def _errors(known: Sequence[tuple[Group, Bins]]) -> str:
    """Return the errors of what is drawn, where a caption has room for them."""
    if len(known) > MOST:
        return "Expected calibration errors: see the table."
    found = [(group.label, over_examples(own, group.runs[0].seed)) for group, own in known]
    each = ", ".join(f"{label} {ECE.show(error)}" for label, error in found)
    return f"Expected calibration error in %: {each} ({found[0][1].method})."
