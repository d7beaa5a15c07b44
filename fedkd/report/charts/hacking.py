"""Proxy and golden loss by round, and against one another: whether teachers' errors are learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedkd.metrics.intervals import mean_t
from fedkd.report.charts.canvas import Canvas, Rest, seeds
from fedkd.report.charts.rounds import shade
from fedkd.report.charts.sheet import Sheet, sheet
from fedkd.report.collection import Group
from fedkd.report.drawn import Drawn
from fedkd.report.style import series

PANELS = (
    ("round", "distillation loss on the pool"),
    ("round", "test loss in nats"),
    ("distillation loss on the pool", "test loss in nats"),
)


def hacking(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the curves of all labels that distil on a pool in enough rounds, one figure a point."""
    from fedkd.report import hacking as curves

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        found = [(g, curves.checkpoints(g)) for g in canvas.at(None, None, rest)]
        known = [(g, held) for g, held in found if held is not None and held.enough]
        if not known:
            return None
        with sheet(canvas.folder / name, len(known), 3, shared=False) as made:
            for group, held in known:
                _draw(made, canvas, group, held, len(known))
            for axes, (x, y) in zip(made.panels, PANELS, strict=True):
                axes.set_xlabel(x)
                axes.set_ylabel(y)
                for which in ("x", "y"):
                    logarithmic(axes, which, whole=x == "round" and which == "x")
        groups = [g for g, _ in known]
        said = [f"{g.label}: {curves.verdict(curves.judged(held, g.runs[0].seed))}"
                for g, held in known]  # fmt: skip
        short = [g.label for g, held in found if held is not None and not held.enough]
        lacking = f"Too few rounds to be drawn: {', '.join(short)}." if short else ""
        caption = (
            f"Logarithmic axes; geometric means over {seeds(groups)}"
            f"{_bands(groups)}. Ring: the round in which the test loss is least. Right: later "
            "rounds further left, if the distillation loss falls; a line that turns up there is "
            f"the sign of teacher hacking. {'; '.join(said)}. {curves.HONEST} {lacking} {end}"
        )
        return canvas.drawn(name, "Teacher hacking on the public pool", caption, "teachers")

    yield from canvas.each(None, one, "teacher-hacking")


def _draw(made: Sheet, canvas: Canvas, group: Group, held: Any, labels: int) -> None:
    k, rounds = canvas.number(group.label), held.rounds
    best = int(held.golden.mean(axis=0).argmin())
    proxy, golden = (np.exp(np.log(t).mean(axis=0)) for t in (held.proxy, held.golden))
    left, middle, right = made.panels
    for axes, x, y, table in (
        (left, rounds, proxy, held.proxy),
        (middle, rounds, golden, held.golden),
        (right, proxy, golden, None),
    ):
        made.line(axes, k, group.label, x, y, linewidth=1.2)
        if table is not None and len(table) > 1:
            found = [mean_t(column) for column in np.log(table).T]
            low, high = (np.exp([getattr(e, end) for e in found]) for end in ("low", "high"))
            made.band(axes, k, list(x), list(low), list(high), shade(labels))
        # The last round shows which way the curve goes.
        made.points(axes, k, group.label, [x[-1]], [y[-1]], size=3.4)
        if table is not held.proxy:
            ring(made, axes, k, (x[best], y[best]))


def ring(made: Sheet, axes: Any, k: int, at: tuple[float, float]) -> None:
    """Mark a point of a series that is no marker of its own."""
    (drawn,) = axes.plot(
        *([place] for place in at), "o", markersize=8, color=series(k)["color"],
        markerfacecolor="none", zorder=4,
    )  # fmt: skip
    made.mark(drawn, k, "ring")


def _bands(groups: Sequence[Group]) -> str:
    if all(len(g.runs) == 1 for g in groups):
        return ", without intervals"
    return ", bands their 95 % interval (Student's t of the logarithms)"


def logarithmic(axes: Any, which: str, whole: bool = False) -> None:
    """Make an axis logarithmic with a few ticks that can be read, over any range."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis.set_major_locator(FixedLocator(ticks(low, high, whole)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return round numbers from ``low`` to ``high``, both above 0, at most about five.

    >>> ticks(0.8, 9.0, whole=True), ticks(0.0008, 2.5), ticks(1.12, 1.31)
    ([1.0, 2.0, 5.0], [0.001, 0.01, 0.1, 1.0], [1.15, 1.2, 1.25, 1.3])
    """
    from matplotlib.ticker import MaxNLocator

    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        found = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        found = [float(f"{t:.6g}") for t in found if not whole or t >= 1]
        if len(found) > 2:
            step = -(-len(found) // 5)
            return found[::step]
    made = MaxNLocator(4, integer=whole, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{t:.6g}") for t in made if low <= t <= high]
