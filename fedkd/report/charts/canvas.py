"""What every chart needs of a collection: who is number k, which groups lie along an axis.

Also the sentences of captions that are the same for all: what is accuracy, what an interval, what
is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fedkd.axes import named
from fedkd.report.collection import RATIO, Collection, Group, Value, axis_title
from fedkd.report.drawn import Drawn
from fedkd.types import Estimate

if TYPE_CHECKING:
    from fedkd.report.measures import Target

Rest = dict[str, Value]
MOST_SLICES, MOST_PANELS = 4, 6


@dataclass(frozen=True, eq=False)
class Canvas:
    """A collection on its way to figures in ``folder``."""

    collection: Collection
    target: Target | None
    folder: Path

    @cached_property
    def groups(self) -> list[Group]:
        """The groups with at least one run that was judged."""
        return [g for g in self.collection.groups if any(len(c.rounds) for c in g.curves)]

    @cached_property
    def labels(self) -> list[str]:
        """The labels that have a result."""
        held = {g.label for g in self.groups}
        return [label for label in self.collection.labels if label in held]

    def number(self, label: str) -> int:
        """Return the number of a label: its colour, dashes and marker in every figure."""
        return list(self.collection.labels).index(label)

    @cached_property
    def text(self) -> bool:
        """Whether all runs are of text."""
        return all(c.bits is not None for g in self.groups for c in g.curves)

    @property
    def accuracy(self) -> str:
        """What accuracy is called on axes."""
        return "next-token accuracy in %" if self.text else "user accuracy in %"

    @cached_property
    def axes(self) -> list[str]:
        """The axes with two values or more, the ratio first, one of those that move together."""
        several = [k for k, values in self.collection.axes.items() if len(values) > 1]
        found: list[str] = []
        for key in sorted(several, key=lambda k: (k != RATIO, several.index(k))):
            if not any(key in self.companions(other) for other in found):
                found.append(key)
        return found

    @property
    def main(self) -> str | None:
        """The axis that comes first: the participation ratio where it varies."""
        return next(iter(self.axes), None)

    def companions(self, axis: str) -> set[str]:
        """Return the axes that move together with an axis."""
        points = self.collection.points()
        found = set()
        for other in self.collection.axes:
            pairs = {(named(p[axis]), named(p[other])) for p in points if axis in p and other in p}
            ours, theirs = ({pair[i] for pair in pairs} for i in (0, 1))
            if other != axis and len(pairs) == len(ours) == len(theirs) > 1:
                found.add(other)
        return found

    def slices(self, axis: str | None) -> list[Rest]:
        """Return every combination of the other axes that has a result."""
        away = set() if axis is None else {axis, *self.companions(axis)}
        single = {k for k, values in self.collection.axes.items() if len(values) < 2}
        found: list[Rest] = []
        for point in self.collection.points():
            rest = {k: v for k, v in point.items() if k not in away | single}
            if rest not in found and any(_within(g.point, rest) for g in self.groups):
                found.append(rest)
        return found

    def along(self, axis: str, label: str, rest: Rest) -> list[tuple[Value, Group]]:
        """Return a label's groups with a result by value of an axis, other axes as in ``rest``."""
        return [
            (value, group)
            for value in self.collection.axes[axis]
            for group in self.groups
            if group.label == label
            and axis in group.point
            and group.point[axis] == value
            and _within(group.point, rest)
        ]

    def at(self, axis: str | None, value: Value | None, rest: Rest) -> list[Group]:
        """Return the groups of all labels at one value of an axis."""
        here = rest if axis is None or value is None else {**rest, axis: value}
        return [g for g in self.groups if _within(g.point, here)]

    def panels(self, axis: str | None, rest: Rest) -> tuple[list[Value | None], int]:
        """Return the values of an axis that get a panel, and how many are left out."""
        if axis is None:
            return [None], 0
        values: list[Value | None] = [
            v for v in self.collection.axes[axis] if self.at(axis, v, rest)
        ]
        if len(values) <= MOST_PANELS:
            return values, 0
        step = (len(values) - 1) / (MOST_PANELS - 1)
        kept = [values[round(i * step)] for i in range(MOST_PANELS)]
        return kept, len(values) - len(kept)

    def each(
        self, axis: str | None, draw: Callable[[str, Rest, str], Drawn | None], name: str
    ) -> list[Drawn]:
        """Draw one figure a slice, at most four; ``draw`` is given name, slice, caption's end."""
        rests = self.slices(axis)
        made = []
        for i, rest in enumerate(rests[:MOST_SLICES]):
            left = len(rests) - MOST_SLICES
            more = [f"All with {where(rest)}." if rest else ""]
            if left > 0:
                more.append(f"{left} further slices of the other axes are not drawn.")
            more.append(missing(self.collection, rest))
            stem = name if len(rests) == 1 else f"{name}-{slug(where(rest)) or i}"
            drawn = draw(stem, rest, " ".join(filter(None, more)))
            if drawn is not None:
                title = ", ".join(filter(None, (drawn.title, where(rest))))
                made.append(replace(drawn, title=title))
        return made

    def drawn(self, name: str, title: str, caption: str, section: str) -> Drawn:
        """Return what was written under this name."""
        svg, png, pdf = (self.folder / f"{name}{suffix}" for suffix in (".svg", ".png", ".pdf"))
        said = " ".join(caption.split())
        return Drawn(name, title, said, svg if svg.is_file() else None, png, pdf, section)

    def judged(self) -> str:
        """Return what accuracy means here: read-outs, and of which rounds."""
        found: dict[str, list[str]] = {}
        for group in self.groups:
            labels = found.setdefault(" ".join(group.runs[0].headline), [])
            if group.label not in labels:
                labels.append(group.label)
        said = "; ".join(
            readout if len(found) == 1 else f"{readout}: {', '.join(labels)}"
            for readout, labels in found.items()
        )
        kind = "next-token accuracy" if self.text else "accuracy"
        return (
            f"Mean over clients of the {kind} on their own test data, by the headline read-out and "
            f"predictor of each method ({said})."
        )

    def last(self) -> str:
        """Return of which rounds a number at the end is."""
        ks = sorted({g.runs[0].experiment.evaluate.last_k for g in self.groups})
        rounds = " or ".join(map(str, ks))
        return f"Each value is the mean of the last {rounds} judged rounds, or of all if fewer."


def _within(point: Rest, rest: Rest) -> bool:
    return all(key in point and point[key] == value for key, value in rest.items())


def where(rest: Rest) -> str:
    """Return a point in words.

    >>> where({"clients.participation.ratio": 0.1, "rounds": 5})
    'participation ratio 0.1, rounds 5'
    """
    return ", ".join(f"{axis_title(key)} {named(value)}" for key, value in rest.items())


def slug(text: str) -> str:
    """Return a text as part of a file name.

    >>> slug("participation ratio 0.1")
    'participation-ratio-0.1'
    """
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:60]


def seeds(groups: Iterable[Group]) -> str:
    """Return over how many seeds values are means."""
    counts = sorted({len(g.runs) for g in groups})
    if not counts or counts == [1]:
        return "one seed"
    return " to ".join(str(c) for c in dict.fromkeys((counts[0], counts[-1]))) + " seeds"


def intervals(found: Sequence[Estimate]) -> str:
    """Return what bars are, by how they were made; what has none is told."""
    methods = list(dict.fromkeys(e.method for e in found if not math.isnan(e.low)))
    bare = sum(math.isnan(e.low) for e in found)
    if not methods:
        return "Without intervals: a single seed has none."
    said = f"Bars: {' or '.join(methods)}."
    return said + (f" {bare} of the points have none." if bare else "")


def missing(collection: Collection, rest: Rest) -> str:
    """Return which runs have no result, of those that a figure would show."""
    here = [g for g in collection.groups if _within(g.point, rest)]
    begun = sum(m.seed in g.seeds for g in here for m in g.missing)
    lost = [(g, m) for g in here for m in g.missing if m.seed not in g.seeds]
    said = f"{begun} runs are under way, and shown as far as they came. " if begun else ""
    if lost:
        states = [m.state for _, m in lost]
        counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
        labels = ", ".join(dict.fromkeys(g.label for g, _ in lost))
        runs = len(lost) + sum(len(g.runs) for g in here)
        said += f"Without a result, so not shown: {len(lost)} of {runs} runs ({counts}; {labels})."
    return said.strip()
