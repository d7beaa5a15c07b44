"""Which numbers are drawn against the axes of a sweep, and what their captions say."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fedkd.report.charts.along import Measure, against
from fedkd.report.charts.canvas import Canvas
from fedkd.report.charts.sheet import plain
from fedkd.report.collection import Group
from fedkd.report.comparison import BASELINES
from fedkd.report.drawn import Drawn
from fedkd.types import Estimate

MOST_AXES = 3


def accuracy(canvas: Canvas) -> Iterator[Drawn]:
    """Draw user accuracy against every axis, at most three."""
    from fedkd.report import measures

    for axis in canvas.axes[:MOST_AXES]:
        yield from against(canvas, axis, Measure(
            name="accuracy", title="Accuracy", y=canvas.accuracy, of=measures.user_accuracy,
            low=-1, high=101, caption=f"{canvas.judged()} {canvas.last()}",
        ))  # fmt: skip
        if canvas.text:
            yield from against(canvas, axis, Measure(
                name="bits", title="Bits per character", y="bits per character", scale=1, low=0,
                of=measures.bits_per_character,
                caption="Mean over clients, on their own test data; lower is better. "
                f"{canvas.last()}",
            ))  # fmt: skip


def fairness(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the worst 10 % and the standard deviation over clients against the main axis."""
    from fedkd.report import measures

    if canvas.main is None:
        return
    yield from against(canvas, canvas.main, Measure(
        name="worst", title="Worst 10 % of clients", y="accuracy of the worst 10 % in %",
        of=measures.worst_share, low=-1, high=101, section="fairness",
        caption="Mean accuracy of the tenth of the clients that is served worst, which may be "
        f"others with every label. {canvas.last()}",
    ))  # fmt: skip
    yield from against(canvas, canvas.main, Measure(
        name="spread", title="Spread over clients", y="standard deviation in points",
        of=measures.spread, low=-0.5, section="fairness",
        caption="Standard deviation of the accuracy over clients; lower is more even, which a "
        f"method can also be by serving all badly. {canvas.last()}",
    ))  # fmt: skip


def to_target(canvas: Canvas) -> Iterator[Drawn]:
    """Draw rounds and bytes until the target accuracy against the main axis."""
    from fedkd.report import measures

    target = canvas.target
    if canvas.main is None or target is None:
        return

    def short(group: Group) -> bool:
        count, of = measures.reached(group, target)
        return count < of

    caption = (
        f"Until the mean over clients first reaches {target} "
        f"({target.origin}), of the seeds that reach it. Hollow: not all seeds did, so the value "
        "is too low; no marker: none did."
    )
    yield from against(canvas, canvas.main, Measure(
        name="rounds-to-target", title="Rounds to the target", y="rounds to the target", scale=1,
        of=lambda g: measures.rounds_to(g, target), hollow=short, log=True, low=0,
        section="traffic", caption=caption,
    ))  # fmt: skip
    yield from against(canvas, canvas.main, Measure(
        name="bytes-to-target", title="Bytes to the target", y="MB to the target", scale=1e-6,
        of=lambda g: measures.bytes_to(g, target), hollow=short, log=True, low=0,
        section="traffic", caption=f"{caption} Training up and down, all clients.",
    ))  # fmt: skip


def differences(canvas: Canvas) -> Iterator[Drawn]:
    """Draw by how much every label is better than each baseline on the same seeds."""
    if canvas.main is not None:
        for reference in references(canvas):
            yield from _difference(canvas, canvas.main, reference)


def _difference(canvas: Canvas, axis: str, reference: str) -> Iterator[Drawn]:
    from fedkd.report import measures

    def difference(group: Group) -> Estimate | None:
        other = canvas.collection.group(reference, group.point)
        if group.label == reference or other is None or not other.runs:
            return None
        return measures.difference(group, other)

    yield from against(canvas, axis, Measure(
        name=f"difference-{canvas.number(reference)}", title=f"Difference from {reference}",
        of=difference, y="difference in points", zero=f"as {plain(reference)}",
        section="differences",
        caption=f"Accuracy above that of {reference} with the same seeds and data, in percentage "
        f"points. {canvas.last()} With few seeds these bars are too narrow where seeds differ: the "
        "table has Student's t over seeds beside them, and many differences are looked at here.",
    ))  # fmt: skip


def references(canvas: Canvas) -> list[str]:
    """Return the labels that others are compared to: the baselines, FedAvg, else the first."""
    if len(canvas.labels) < 2:
        return []
    for names in (BASELINES, ("fedavg",)):
        firsts = {g.strategy: g.label for g in reversed(canvas.groups) if g.strategy in names}
        if firsts:
            return [firsts[name] for name in names if name in firsts]
    return canvas.labels[:1]


def epsilon(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the epsilon spent at the end against the main axis."""
    if canvas.main is None:
        return

    def spent(group: Group) -> Estimate | None:
        found = [c.epsilon[max(c.epsilon)] for c in group.curves if c.epsilon]
        if len(found) < len(group.curves):
            return None
        return Estimate(max(found), math.nan, math.nan, len(found), "largest over seeds")

    yield from against(canvas, canvas.main, Measure(
        name="epsilon", title="Epsilon", y="epsilon spent", of=spent, scale=1, log=True, low=0,
        section="privacy",
        caption="Epsilon after the last round, the largest over seeds, as each run's ledger claims "
        "it: an upper bound, with the unit, delta and gaps that stand beside the claims. Labels "
        "without a finite epsilon are not shown.",
    ))  # fmt: skip
