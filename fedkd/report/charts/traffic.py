"""What accuracy costs in bytes: every label at every point, and the front that nothing beats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkd.report.charts.canvas import MOST_PANELS, Canvas, intervals, where
from fedkd.report.charts.sheet import Sheet, clipped, outer, plain, sheet
from fedkd.report.collection import Group
from fedkd.report.drawn import Drawn
from fedkd.report.style import INK
from fedkd.types import Estimate

MOST_NAMED = 9


@dataclass(frozen=True)
class Offer:
    """A label at a point: megabytes for accuracy in per cent."""

    group: Group
    cost: float
    worth: Estimate


def front(offers: Sequence[Offer]) -> list[Offer]:
    """Return the offers that no other beats: none costs as little and is worth more, by cost."""
    found: list[Offer] = []
    for offer in sorted(offers, key=lambda o: (o.cost, -o.worth.value)):
        if not found or offer.worth.value > found[-1].worth.value:
            found.append(offer)
    return found


def pareto(canvas: Canvas) -> Iterator[Drawn]:
    """Draw accuracy against the bytes of training; only the same data can be compared.

    Points that differ in what is learned from (axes of data or clients' number) get a panel each.
    """
    for name, rest, groups, left in _scenes(canvas):
        offers = list(_offers(groups))
        if not offers:
            continue
        best = front(offers)
        stem = canvas.folder / name
        with sheet(stem, len({o.group.label for o in offers}) + 1, height=3.0) as made:
            (axes,) = made.panels
            log = _spread(offers)
            shift = _place(offers, log)
            _offered(made, axes, canvas, offers, shift)
            _front(made, axes, best, shift)
            if log:
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter("{x:g}")
            outer(made, "MB of training, up and down", canvas.accuracy)
            values = [o.worth.value for o in offers]
            room = max(float(np.ptp(values)), 5.0)
            clipped(axes, max(-1, min(values) - room), min(101, max(values) + room))
            low, high = axes.get_ylim()
            cut = any(o.worth.low < low or o.worth.high > high for o in offers)
        caption = (
            f"Every label at every point{f' of {where(rest)}' if rest else ''}: all bytes of "
            "training of all clients, both ways, without judging, against final accuracy. "
            f"{canvas.judged()} {canvas.last()} {intervals([o.worth for o in offers])} "
            f"{_named(best, set(rest))} {_silent(offers, log)}"
            f"{'Some bars go on beyond the axes. ' * cut}"
            f"{f'{left} further slices are not drawn.' if left else ''}"
        )
        yield canvas.drawn(name, "Accuracy against bytes", caption, "traffic")


def _scenes(canvas: Canvas) -> Iterator[tuple[str, dict[str, Any], list[Group], int]]:
    """Return the groups that can be compared: those with the same data."""
    apart = [
        k
        for k, values in canvas.collection.axes.items()
        if len(values) > 1 and k.startswith(("data.", "clients.count"))
    ]
    rests: list[dict[str, Any]] = []
    for group in canvas.groups:
        rest = {k: group.point[k] for k in apart if k in group.point}
        if rest not in rests:
            rests.append(rest)
    for i, rest in enumerate(rests[:MOST_PANELS]):
        name = "bytes" if len(rests) == 1 else f"bytes-{i}"
        left = max(0, len(rests) - MOST_PANELS)
        yield name, rest, canvas.at(None, None, rest), left


def _offers(groups: Sequence[Group]) -> Iterator[Offer]:
    from fedkd.report import measures

    for group in groups:
        sent, worth = measures.bytes_total(group), measures.user_accuracy(group)
        if sent is not None and worth is not None:
            low, high = 100 * worth.low, 100 * worth.high
            found = Estimate(100 * worth.value, low, high, worth.n, worth.method)
            yield Offer(group, sent.value / 1e6, found)


def _spread(offers: Sequence[Offer]) -> bool:
    costs = [o.cost for o in offers if o.cost > 0]
    return bool(costs) and max(costs) > 10 * min(costs)


def _place(offers: Sequence[Offer], log: bool) -> float:
    """Return where what sends nothing stands: on a log axis left of all others."""
    costs = [o.cost for o in offers if o.cost > 0]
    return min(costs) * (min(costs) / max(costs)) ** 0.12 if log else 0.0


def _offered(
    made: Sheet, axes: Any, canvas: Canvas, offers: Sequence[Offer], silent: float
) -> None:
    for label in canvas.labels:
        own = [o for o in offers if o.group.label == label]
        if own:
            k, x = canvas.number(label), [o.cost or silent for o in own]
            made.bars(axes, k, x, [o.worth.low for o in own], [o.worth.high for o in own])
            made.points(axes, k, label, x, [o.worth.value for o in own], [o.cost == 0 for o in own])


def _front(made: Sheet, axes: Any, best: Sequence[Offer], silent: float) -> None:
    from matplotlib.lines import Line2D

    x = [o.cost or silent for o in best]
    y = [o.worth.value for o in best]
    look: dict[str, Any] = {"color": INK, "linewidth": 0.9, "linestyle": (0, (3, 2)), "alpha": 0.8}
    if len(best) > 1:
        axes.step(x, y, where="post", zorder=1, **look)
    made.notes.append((Line2D([], [], **look), "Pareto front"))
    for number, (a, b) in enumerate(zip(x, y, strict=True), start=1):
        axes.annotate(
            str(number), (a, b), (4, 3), textcoords="offset points", fontsize=7, va="bottom",
        )  # fmt: skip


def _named(best: Sequence[Offer], known: set[str]) -> str:
    said = [
        f"{i} {plain(o.group.label)}"
        + "".join(f", {where({k: v})}" for k, v in o.group.point.items() if k not in known)
        for i, o in enumerate(best, start=1)
    ]
    more = f"; and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
    said = [text.replace(r"\$", "$") for text in said[:MOST_NAMED]]
    return (
        f"Numbered, on the front by means alone: {'; '.join(said)}{more}. Where bars overlap, the "
        "order may be chance."
    )


def _silent(offers: Sequence[Offer], log: bool) -> str:
    if all(o.cost > 0 for o in offers) or math.isnan(offers[0].cost):
        return ""
    return f"Hollow: sends nothing{' (0 MB, at the left edge)' if log else ''}. "
