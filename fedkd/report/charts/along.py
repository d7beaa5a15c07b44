"""A number at the end of runs against an axis of the sweep: accuracy, fairness, costs, budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedkd.report.charts.canvas import Canvas, Rest, intervals
from fedkd.report.charts.scale import Scale
from fedkd.report.charts.sheet import Sheet, clipped, sheet
from fedkd.report.collection import Group, Value, axis_title
from fedkd.report.drawn import Drawn
from fedkd.types import Estimate

Number = Callable[[Group], Estimate | None]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is drawn against an axis: ``scale`` times ``of``, between ``low`` and ``high``.

    ``caption`` says what it is. ``hollow`` says of which groups the marker is not filled. With
    ``log``, the axis is logarithmic where values span more than ten times. ``zero``: a line at 0.
    """

    name: str
    title: str
    y: str
    of: Number
    caption: str
    section: str = "axis"
    scale: float = 100.0
    low: float = -math.inf
    high: float = math.inf
    hollow: Callable[[Group], bool] | None = None
    log: bool = False
    zero: str = ""


def against(canvas: Canvas, axis: str, measure: Measure) -> Iterator[Drawn]:
    """Draw a measure against an axis, every label, one figure for each slice of other axes."""
    short = axis.rsplit(".", 1)[-1].replace("_", "-")

    def one(name: str, rest: Rest, end: str) -> Drawn | None:
        found = _found(canvas, axis, rest, measure)
        if not found:
            return None
        with sheet(canvas.folder / name, len(found) + bool(measure.zero)) as made:
            (axes,) = made.panels
            shown = {v for label in canvas.labels for v, _ in canvas.along(axis, label, rest)}
            scale = Scale(tuple(v for v in canvas.collection.axes[axis] if v in shown))
            for place, (label, points) in enumerate(found.items()):
                _series(made, canvas, label, points, scale, (place, len(found)))
            cut = _finish(made, axes, measure, [e for p in found.values() for _, e, _ in p])
            scale.apply(axes)
            axes.set_xlabel(axis_title(axis))
        every = [e for points in found.values() for _, e, _ in points]
        lacking = [label for label in canvas.labels if label not in found]
        more = f"Not shown, as there is no value: {', '.join(lacking)}." if lacking else ""
        more += " Some bars go on beyond the axes." if cut else ""
        beside = "Labels stand side by side so that bars can be seen." if len(found) > 1 else ""
        caption = f"{measure.caption} {intervals(every)} {beside} {more} {end}"
        title = f"{measure.title} against {axis_title(axis)}"
        return canvas.drawn(name, title, caption, measure.section)

    yield from canvas.each(axis, one, f"{measure.name}-by-{short}")


def _found(
    canvas: Canvas, axis: str, rest: Rest, measure: Measure
) -> dict[str, list[tuple[Value, Estimate, bool]]]:
    """Return by label (value of the axis, estimate on its scale, whether hollow)."""
    found: dict[str, list[tuple[Value, Estimate, bool]]] = {}
    for label in canvas.labels:
        for value, group in canvas.along(axis, label, rest):
            estimate = measure.of(group)
            if estimate is None or not math.isfinite(estimate.value):
                continue
            scaled = replace(
                estimate,
                value=measure.scale * estimate.value,
                low=measure.scale * estimate.low,
                high=measure.scale * estimate.high,
            )
            hollow = measure.hollow is not None and measure.hollow(group)
            found.setdefault(label, []).append((value, scaled, hollow))
    return found


def _series(
    made: Sheet,
    canvas: Canvas,
    label: str,
    points: Sequence[tuple[Value, Estimate, bool]],
    scale: Scale,
    place: tuple[int, int],
) -> None:
    """Draw one label: markers with bars, and a line where the axis is one of numbers."""
    (axes,), k = made.panels, canvas.number(label)
    x = [scale.shifted(value, *place) for value, _, _ in points]
    y = [e.value for _, e, _ in points]
    if scale.kind != "names" and len(points) > 1:
        made.line(axes, k, label, x, y, linewidth=1.2)
    made.bars(axes, k, x, [e.low for _, e, _ in points], [e.high for _, e, _ in points])
    made.points(axes, k, label, x, y, [hollow for _, _, hollow in points])


def _finish(made: Sheet, axes: Any, measure: Measure, found: Sequence[Estimate]) -> bool:
    """Set the upright axis; return whether bars are cut off by it."""
    values = [e.value for e in found]
    axes.set_ylabel(measure.y)
    if measure.log and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    elif measure.zero:
        from matplotlib.lines import Line2D

        from fedkd.report.style import INK

        look: dict[str, Any] = {"color": INK, "linewidth": 1.0, "linestyle": (0, (1, 1.5))}
        axes.axhline(0, zorder=1, **look)
        made.notes.append((Line2D([], [], **look), measure.zero))
    else:
        # An interval far beyond the values would press them together.
        low, high = min(values), max(values)
        room = max(1.5 * (high - low), 0.1 * abs(high), 1e-9)
        clipped(axes, max(measure.low, low - room), min(measure.high, high + room))
    bottom, top = axes.get_ylim()
    # Bounds that are NaN are not beyond anything.
    return any(e.low < max(bottom, measure.low) or e.high > min(top, measure.high) for e in found)
