"""How accuracy is shared out: every client from the worst to the best, and mean against worst."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedkd.report.charts.canvas import Canvas, Rest, seeds
from fedkd.report.charts.rounds import panel_title
from fedkd.report.charts.sheet import clipped, outer, sheet
from fedkd.report.collection import Group, axis_title
from fedkd.report.drawn import Drawn
from fedkd.report.style import series

LEVELS = np.linspace(0, 1, 26)


def clients(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the accuracy of clients in ascending order, one panel for each value of the main axis.

    Curves of ten labels can be told apart where ten violins or boxes at each value cannot.
    """
    main = canvas.main

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        values, left = canvas.panels(main, rest)
        groups = [g for v in values for g in canvas.at(main, v, rest)]
        if not groups:
            return None
        with sheet(canvas.folder / name, len({g.label for g in groups}), len(values)) as made:
            for axes, value in zip(made.panels, values, strict=True):
                for group in canvas.at(main, value, rest):
                    curve = ordered(group)
                    if curve is None:
                        continue
                    k = canvas.number(group.label)
                    made.line(axes, k, group.label, 100 * LEVELS, 100 * curve)
                    first = 3 + 4 * (k % 5)
                    at = slice(first, None, 9) if len(values) == 1 else slice(first, first + 1)
                    (drawn,) = axes.plot(
                        100 * LEVELS[at], 100 * curve[at], series(k)["marker"], markersize=3,
                        color=series(k)["color"],
                    )  # fmt: skip
                    made.mark(drawn, k, "markers")
                panel_title(axes, main, value)
            outer(made, "clients, worst to best, in %", "accuracy in %")
            clipped(made.panels[0], -1, 101)
        caption = (
            "Accuracy of each client, sorted within each run (so the same place need not be the "
            f"same client), mean over {seeds(groups)}; without intervals. A flat line serves all "
            f"alike. {canvas.last()} {(left and f'{left} values in between have no panel.') or ''}"
        )
        return canvas.drawn(name, "Accuracy over clients", f"{caption} {end}", "fairness")

    yield from canvas.each(main, one, "clients")


def ordered(group: Group) -> np.ndarray | None:
    """Return the quantiles over clients at :data:`LEVELS`, mean over seeds."""
    found = []
    for run in group.runs:
        values = run.curves.by_client(run.experiment.evaluate.last_k)
        values = values[~np.isnan(values)]
        if values.size:
            found.append(np.quantile(values, LEVELS))
    return np.mean(found, axis=0) if found else None


def worst(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the worst 10 % against the mean over clients; larger markers are larger axis values."""
    from fedkd.report import measures

    main = canvas.main

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        groups = canvas.at(None, None, rest)
        values = [] if main is None else list(canvas.collection.axes[main])
        with sheet(canvas.folder / name, len({g.label for g in groups})) as made:
            (axes,) = made.panels
            for label in canvas.labels:
                own = [g for g in groups if g.label == label]
                found = [(g, measures.user_accuracy(g), measures.worst_share(g)) for g in own]
                known = [(g, 100 * a.value, 100 * b.value) for g, a, b in found if a and b]
                if not known:
                    continue
                k = canvas.number(label)
                if len(known) > 1:
                    made.line(axes, k, label, [x for _, x, _ in known], [y for *_, y in known],
                              linewidth=0.9, alpha=0.6)  # fmt: skip
                for group, x, y in known:
                    rank = values.index(group.point[main]) if main in group.point else 1
                    size = 3.0 + 4.0 * rank / max(len(values) - 1, 1)
                    made.points(axes, k, label, [x], [y], size=size)
            axes.set_xlabel(canvas.accuracy)
            axes.set_ylabel("accuracy of the worst 10 % in %")
            axes.locator_params(nbins=7)
        grows = "" if main is None else (
            f"Markers grow, and lines go, with the {axis_title(main)}, over the whole range of it. "
        )  # fmt: skip
        caption = (
            f"Each marker: one label at one point, mean over {seeds(groups)}; without intervals, "
            f"which stand in the figures of each number. {grows}Up and right is better. "
            f"{canvas.last()} {end}"
        )
        return canvas.drawn(name, "Worst 10 % against mean", caption, "fairness")

    yield from canvas.each(main, one, "worst-against-mean")
