"""Time: seconds that rounds took on the machine at hand, and accuracy over simulated time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedkd.metrics.intervals import mean_t
from fedkd.report.charts.along import Measure, against
from fedkd.report.charts.canvas import Canvas, Rest
from fedkd.report.charts.rounds import over_seeds, panel_title, shade
from fedkd.report.charts.sheet import clipped, outer, sheet, thinned
from fedkd.report.collection import Group
from fedkd.report.curves import Curves
from fedkd.report.drawn import Drawn
from fedkd.report.style import series
from fedkd.types import Estimate


def seconds(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the seconds that a round of training took against the main axis, or by label."""

    def of(group: Group) -> Estimate | None:
        each = [c.seconds[~np.isnan(c.seconds)] for c in group.curves]
        means = [float(s.mean()) for s in each if s.size]
        return mean_t(means) if means else None

    if canvas.main is None:
        return
    yield from against(canvas, canvas.main, Measure(
        name="seconds", title="Seconds per round", y="seconds per round", of=of, scale=1, low=0,
        log=True, section="costs",
        caption="Wall-clock seconds of training per round, on the machines that did the runs, with "
        "whatever else ran beside them; they differ from run to run and compare methods only "
        "roughly.",
    ))  # fmt: skip


def simulated(canvas: Canvas) -> Iterator[Drawn]:
    """Draw accuracy against simulated time, where rounds have a simulated duration."""
    main = canvas.main
    timed = [g for g in canvas.groups if all(map(has_clock, g.curves))]
    if not timed:
        return

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        values, left = canvas.panels(main, rest)
        groups = [g for v in values for g in canvas.at(main, v, rest) if g in timed]
        if not groups:
            return None
        with sheet(canvas.folder / name, len({g.label for g in groups}), len(values)) as made:
            for axes, value in zip(made.panels, values, strict=True):
                for group in canvas.at(main, value, rest):
                    if group not in timed:
                        continue
                    x, y, low, high = _over_time(group.curves)
                    kept = list(thinned(len(x), max(20, 200 // len(groups))))
                    k = canvas.number(group.label)
                    made.line(axes, k, group.label, x[kept], y[kept], marker=len(kept) == 1)
                    made.band(axes, k, x[kept], low[kept], high[kept], shade(len(groups)))
                    (drawn,) = axes.plot(x[-1:], y[-1:], series(k)["marker"], markersize=3.4,
                                         color=series(k)["color"])  # fmt: skip
                    made.mark(drawn, k, "markers")
                panel_title(axes, main, value)
            outer(made, "simulated time", canvas.accuracy)
            clipped(made.panels[0], -1, 101)
        skipped = [label for label in canvas.labels if label not in {g.label for g in groups}]
        caption = (
            "Accuracy against the simulated duration of all rounds until then, in the unit of the "
            f"participation model, not in seconds of any machine. {canvas.judged()} "
            f"{over_seeds(groups)} {'Without such a clock: ' * bool(skipped)}{', '.join(skipped)} "
            f"{(left and f'{left} values in between have no panel.') or ''} {end}"
        )
        return canvas.drawn(name, "Accuracy against simulated time", caption, "time")

    yield from canvas.each(main, one, "simulated-time")


def has_clock(curves: Curves) -> bool:
    """Return whether a run has simulated durations, and was judged."""
    return len(curves.rounds) > 0 and bool((~np.isnan(curves.clock)).any())


def _over_time(found: list[Curves]) -> tuple[np.ndarray, ...]:
    """Return time, mean, low and high at the rounds that all seeds have; time is a mean too."""
    rounds = sorted(set.intersection(*({int(t) for t in c.rounds} for c in found)))
    times, values = [], []
    for c in found:
        total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(c.clock))])
        times.append(total[np.searchsorted(c.played, rounds, side="right")])
        mean = dict(zip(map(int, c.rounds), c.mean(), strict=True))
        values.append([100 * mean[t] for t in rounds])
    estimates = [mean_t(column) for column in np.array(values).T]
    return (
        np.mean(times, axis=0),
        *(np.array([getattr(e, part) for e in estimates]) for part in ("value", "low", "high")),
    )
