"""Accuracy against agreement with the teacher: who gains, and who only follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fedkd.report.charts.canvas import Canvas, Rest, intervals, seeds
from fedkd.report.charts.rounds import panel_title
from fedkd.report.charts.sheet import Sheet, clipped, outer, sheet
from fedkd.report.collection import Group
from fedkd.report.drawn import Drawn
from fedkd.report.style import series
from fedkd.types import Estimate

MOST = 400
"""Single clients that a panel shows."""


def fidelity(canvas: Canvas) -> Iterator[Drawn]:
    """Draw accuracy against agreement, one panel for each value of the main axis."""
    from fedkd.report import agreement

    main = canvas.main

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        values, left = canvas.panels(main, rest)
        here = {v: [g for g in canvas.at(main, v, rest) if agreement.overall(g)] for v in values}
        values = [v for v in values if here[v]]
        groups = [g for v in values for g in here[v]]
        if not groups:
            return None
        every: list[Estimate] = []
        with sheet(canvas.folder / name, len({g.label for g in groups}), len(values)) as made:
            for place, value in enumerate(values):
                _clients(made, canvas, here[value], place)
                every += [e for g in here[value] for e in _label(made, canvas, g, place)]
                panel_title(made.panels[place], main, value)
            outer(made, "answers as the teacher's in %", f"{canvas.accuracy}, last round")
            clipped(made.panels[0], -1, 101)
            low, high = made.panels[0].get_xlim()
            made.panels[0].set_xlim(max(low, -1), min(high, 101))
        cut = any(e.low < 0 or e.high > 1 for e in every)
        hollow = "Hollow: of models of the server, as no client is taught. "
        caption = (
            "Agreement with the teacher on the examples that are taught against accuracy on test "
            "data, both of the last round. Large markers: a label, mean over clients and "
            f"{seeds(groups)}. Small dots: its single clients. "
            f"{hollow * any(map(agreement.served, groups))}{intervals(every)} "
            f"{'Some bars go on beyond the axes. ' * cut}"
            f"{correlated(here[values[0]]) if len(values) == 1 else ''} A student that follows "
            "its teacher is no better for it where the teacher is wrong. "
            f"{f'{left} values in between have no panel.' if left else ''} {end}"
        )
        return canvas.drawn(name, "Generalization and fidelity", caption, "teachers")

    yield from canvas.each(main, one, "accuracy-against-agreement")


def _clients(made: Sheet, canvas: Canvas, groups: Sequence[Group], place: int) -> None:
    from fedkd.report.agreement import pairs

    for group in groups:
        both = np.concatenate([pairs(run) for run in group.runs])
        k = canvas.number(group.label)
        shown = 100 * both[:: max(1, -(-len(both) * len(groups) // MOST))]
        if len(shown):
            (drawn,) = made.panels[place].plot(
                shown[:, 0], shown[:, 1], "o", markersize=2.2, color=series(k)["color"],
                alpha=0.4, markeredgewidth=0, zorder=2,
            )  # fmt: skip
            made.mark(drawn, k, "clients")


def _label(made: Sheet, canvas: Canvas, group: Group, place: int) -> list[Estimate]:
    """Draw a label with its intervals both ways; return these."""
    from fedkd.report import agreement

    x, y = agreement.overall(group), agreement.accuracy(group)
    if x is None or y is None:
        return []
    axes, k = made.panels[place], canvas.number(group.label)
    made.bars(axes, k, [100 * x.value], [100 * y.low], [100 * y.high])
    made.bars(axes, k, [100 * y.value], [100 * x.low], [100 * x.high], across=True)
    hollow = [agreement.served(group)]
    made.points(axes, k, group.label, [100 * x.value], [100 * y.value], hollow, size=6.5)
    return [x, y]


def correlated(groups: Sequence[Group]) -> str:
    """Return how agreement goes with accuracy over labels, where there are enough."""
    from fedkd.report import agreement

    both = [(agreement.overall(g), agreement.accuracy(g)) for g in groups]
    known = [(a.value, b.value) for a, b in both if a is not None and b is not None]
    found = agreement.correlation([a for a, _ in known], [b for _, b in known])
    if found is None:
        return ""
    bounds = "" if np.isnan(found.low) else f" [{found.low:.2f}, {found.high:.2f}]"
    return f"Spearman's correlation over {found.n} labels: {found.value:.2f}{bounds}."
