"""Privacy: what was spent by round, and what the three ways to set the noise cost in accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fedkd.report.charts.canvas import MOST_PANELS, Canvas, Rest, intervals
from fedkd.report.charts.rounds import panel_title
from fedkd.report.charts.scale import Scale
from fedkd.report.charts.sheet import Sheet, clipped, outer, plain, sheet, thinned, whole
from fedkd.report.collection import RATIO, Group, Value, axis_title
from fedkd.report.drawn import Drawn
from fedkd.sweep.privacy_curves import CURVES
from fedkd.types import Estimate


def epsilon(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the epsilon spent by round, the largest over seeds."""
    main = canvas.main
    spent = [g for g in canvas.groups if any(c.epsilon for c in g.curves)]
    if not spent:
        return

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        values, left = canvas.panels(main, rest)
        groups = [g for v in values for g in canvas.at(main, v, rest) if g in spent]
        if not groups:
            return None
        low, high = 1e300, 0.0
        with sheet(canvas.folder / name, len({g.label for g in groups}), len(values)) as made:
            for axes, value in zip(made.panels, values, strict=True):
                for group in canvas.at(main, value, rest):
                    series = largest(group)
                    if series:
                        rounds = [list(series)[i] for i in thinned(len(series), 40)]
                        k, y = canvas.number(group.label), [series[t] for t in rounds]
                        low, high = min(low, *y, y[0]), max(high, *y, y[0])
                        made.line(axes, k, group.label, rounds, y, marker=len(rounds) == 1)
                        made.points(axes, k, group.label, rounds[-1:], y[-1:], size=3.4)
                panel_title(axes, main, value)
            outer(made, "round", "epsilon spent")
            for axes in made.panels:
                whole(axes)
            if low > 0 and high > 20 * low:
                made.panels[0].set_yscale("log")
                made.panels[0].yaxis.set_major_formatter("{x:g}")
            else:
                made.panels[0].set_ylim(bottom=0)
        without = [label for label in canvas.labels if label not in {g.label for g in groups}]
        more = f"Without a finite epsilon, so not shown: {', '.join(without)}." if without else ""
        caption = (
            "Epsilon spent up to each round, the largest over seeds: an upper bound on what each "
            "run's ledger covers. Delta, the unit that is protected, adjacency, and what is not "
            "covered stand beside the claims, and labels can be compared only where these agree. "
            f"{more} {(left and f'{left} values in between have no panel.') or ''} {end}"
        )
        return canvas.drawn(name, "Epsilon by round", caption, "privacy")

    yield from canvas.each(main, one, "epsilon-by-round")


def curves(canvas: Canvas) -> Iterator[Drawn]:
    """Draw accuracy against the ratio on the three privacy curves, one panel for each method."""
    bases: dict[str, dict[str, str]] = {}
    for label in canvas.labels:
        base, _, curve = label.rpartition(", ")
        if base and curve in CURVES:
            bases.setdefault(base, {})[curve] = label
    if RATIO not in canvas.axes or not bases:
        return

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        shown = list(bases)[:MOST_PANELS]
        found: list[Estimate] = []
        with sheet(canvas.folder / name, len(CURVES), len(shown)) as made:
            made.kind = "curve"
            for axes, base in zip(made.panels, shown, strict=True):
                for curve, label in bases[base].items():
                    points = canvas.along(RATIO, label, rest)
                    found += _curve(made, axes, CURVES.index(curve), curve, points)
                axes.set_title(plain(base), loc="left")
            scale = Scale(tuple(canvas.collection.axes[RATIO]))
            scale.apply(made.panels[0], 1.0 if len(shown) == 1 else 0.6)
            outer(made, axis_title(RATIO), canvas.accuracy)
            clipped(made.panels[0], -1, 101)
        left = len(bases) - len(shown)
        caption = (
            "The same method with noise that follows the ratio in three ways, which agree at one "
            "ratio. At a fixed noise multiplier epsilon falls with the ratio while the noise on "
            "the mean grows; at a fixed epsilon the noise is calibrated anew at every ratio; at a "
            "fixed noise on the mean epsilon is what differs. Read it beside epsilon against the "
            f"ratio. {canvas.judged()} {canvas.last()} {intervals(found)} "
            f"{(left and f'{left} further methods have no panel.') or ''} {end}"
        )
        return canvas.drawn(name, "Accuracy on three privacy curves", caption, "privacy")

    yield from canvas.each(RATIO, one, "privacy-curves")


def _curve(
    made: Sheet, axes: Any, k: int, name: str, points: Sequence[tuple[Value, Group]]
) -> list[Estimate]:
    from fedkd.report import measures

    found = [(value, measures.user_accuracy(group)) for value, group in points]
    known = [(float(value), e) for value, e in found if e is not None]
    x = [value for value, _ in known]
    made.line(axes, k, name, x, [100 * e.value for _, e in known], marker=True, linewidth=1.2)
    low, high = ([100 * getattr(e, end) for _, e in known] for end in ("low", "high"))
    made.bars(axes, k, x, low, high)
    return [e for _, e in known]


def largest(group: Group) -> dict[int, float]:
    """Return the largest epsilon over seeds by round."""
    found: dict[int, float] = {}
    for curves in group.curves:
        for round_, value in curves.epsilon.items():
            found[round_] = max(value, found.get(round_, 0.0))
    return dict(sorted(found.items()))
