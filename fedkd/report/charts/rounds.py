"""Accuracy by round: every label, one panel for each value of the main axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from fedkd.metrics.intervals import mean_t
from fedkd.report.charts.canvas import Canvas, Rest, seeds, where
from fedkd.report.charts.sheet import Sheet, clipped, outer, plain, sheet, thinned, whole
from fedkd.report.collection import Group, Value
from fedkd.report.curves import Curves, nanmean
from fedkd.report.drawn import Drawn
from fedkd.report.style import MARKERS, series

Series = Callable[[Curves], dict[int, float]]
POINTS, BANDS = 150, 90
"""How many points lines and bands have in all panels of a figure together with one label."""


def accuracy(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the mean over clients by round: mean over seeds with its 95 % t interval."""
    yield from _figures(
        canvas,
        lambda c: _by_round(c, 100 * c.mean()),
        ("accuracy-by-round", "Accuracy by round", canvas.accuracy, canvas.judged()),
        (0, 100),
    )


def bits(canvas: Canvas) -> Iterator[Drawn]:
    """Draw bits per character by round, where all runs are of text."""
    if canvas.text and canvas.groups:
        yield from _figures(
            canvas,
            lambda c: _by_round(c, nanmean(c.bits, 1) if c.bits is not None else c.mean()),
            (
                "bits-by-round",
                "Bits per character by round",
                "bits per character",
                "Mean over clients, on their own test data; lower is better.",
            ),
            (0, math.inf),
        )


def _figures(
    canvas: Canvas, of: Series, names: tuple[str, str, str, str], possible: tuple[float, float]
) -> Iterator[Drawn]:
    stem, title, y, what = names
    main = canvas.main

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        values, left = canvas.panels(main, rest)
        groups = [g for v in values for g in canvas.at(main, v, rest)]
        if not groups:
            return None
        with sheet(canvas.folder / name, len({g.label for g in groups}), len(values)) as made:
            step = 1
            for axes, value in zip(made.panels, values, strict=True):
                here = canvas.at(main, value, rest)
                step = max(step, _panel(made, axes, canvas, here, of, len(values)))
                panel_title(axes, main, value)
            outer(made, "round", y)
            for axes in made.panels:
                clipped(axes, possible[0] - 1, possible[1] + 1)
                whole(axes)
        caption = [what, over_seeds(groups)]
        if step > 1:
            caption.append("Long series are drawn at some of their rounds only, evenly chosen.")
        if left:
            caption.append(f"{left} values in between have no panel.")
        return canvas.drawn(name, title, " ".join([*caption, end]), "accuracy")

    yield from canvas.each(main, one, stem)


def _panel(
    made: Sheet, axes: Any, canvas: Canvas, here: Sequence[Group], of: Series, panels: int
) -> int:
    """Draw all labels of a panel; return how many rounds stand between two that are drawn."""
    step = 1
    everything = max(panels * len(here), 1)
    for group in here:
        rounds, table = common([of(c) for c in group.curves])
        if not rounds:
            continue
        found = [mean_t(column) for column in table.T]
        k, style = canvas.number(group.label), {}
        kept = list(thinned(len(rounds), max(20, 8 * POINTS // everything)))
        step = max(step, (len(rounds) - 1) // max(len(kept) - 1, 1))
        if len(rounds) == 1:
            style = {"marker": True}
        made.line(axes, k, group.label, [rounds[i] for i in kept], [found[i].value for i in kept],
                  **style)  # fmt: skip
        ends = [len(rounds) - 1] if panels > 1 else list(thinned(len(rounds), 4))[1:]
        if len(rounds) > 1:
            drawn = axes.plot(
                [rounds[i] for i in ends], [found[i].value for i in ends], linestyle="none",
                marker=MARKERS[k % len(MARKERS)], markersize=3.4, color=series(k)["color"],
            )  # fmt: skip
            made.mark(drawn[0], k, "markers")
        kept = list(thinned(len(rounds), max(12, 8 * BANDS // everything)))
        low, high = ([getattr(found[i], end) for i in kept] for end in ("low", "high"))
        if len(rounds) == 1:
            made.bars(axes, k, rounds, low, high)
        else:
            made.band(axes, k, [rounds[i] for i in kept], low, high, shade(len(here)))
    return step


def shade(series_: int) -> float:
    """Return how strongly bands are shaded, so that many can lie on one another."""
    return max(0.1, min(0.18, 0.6 / series_))


def common(found: Sequence[dict[int, float]]) -> tuple[list[int], np.ndarray]:
    """Return the rounds with a value in every seed that has any, and the values (seeds, rounds)."""
    held = [{t: v for t, v in one.items() if not math.isnan(v)} for one in found]
    held = [one for one in held if one]
    if not held:
        return [], np.zeros((0, 0))
    rounds = sorted(set.intersection(*(set(one) for one in held)))
    return rounds, np.array([[one[t] for t in rounds] for one in held])


def over_seeds(groups: Sequence[Group]) -> str:
    """Return what lines and bands are."""
    counts = {len(g.runs) for g in groups}
    if counts == {1}:
        return "One seed: there is no interval over seeds, and none is drawn."
    alone = " Lines without a band are of a single seed." if 1 in counts else ""
    return f"Lines: mean over {seeds(groups)}; bands: 95 % interval, Student's t.{alone}"


def panel_title(axes: Any, axis: str | None, value: Value | None) -> None:
    """Say of which value of the axis a panel is."""
    if axis is not None and value is not None:
        axes.set_title(plain(where({axis: value})), loc="left")


def _by_round(curves: Curves, values: np.ndarray) -> dict[int, float]:
    return dict(zip(map(int, curves.rounds), map(float, values), strict=True))
