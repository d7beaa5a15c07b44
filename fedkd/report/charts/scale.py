"""Where the values of an axis stand: numbers in their place, names side by side."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedkd.axes import named
from fedkd.report.charts.sheet import plain
from fedkd.report.collection import Value

WIDE_SPAN = 10.0
CLOSE = 0.055


@dataclass(frozen=True)
class Scale:
    """An axis of a sweep as the horizontal axis of a figure.

    ``log`` where all values are positive and the largest is more than ten times the smallest,
    ``names`` where not all are numbers.
    """

    values: tuple[Value, ...]

    @property
    def kind(self) -> Literal["linear", "log", "names"]:
        """How values are placed."""
        if not all(_number(v) for v in self.values):
            return "names"
        low, high = self._ends()
        return "log" if low > 0 and high > WIDE_SPAN * low else "linear"

    def at(self, value: Value) -> float:
        """Return where a value stands."""
        return float(list(self.values).index(value)) if self.kind == "names" else float(value)

    def shifted(self, value: Value, k: int, series: int) -> float:
        """Return where series ``k`` stands at a value: side by side, so that no bar hides one."""
        step = (0.5 if self.kind == "names" else 0.3) * self._gap()
        # Few stand closer together, at most as far apart as six would.
        offset = step * (k - (series - 1) / 2) / max(series - 1, 5)
        place = self._flat(value) + offset
        return 10**place if self.kind == "log" else place

    def apply(self, axes: Any, width: float = 1.0) -> None:
        """Set scale, limits and ticks; ticks that would overlap are left out.

        ``width`` is that of the panel, as a share of one column of a paper.
        """
        from matplotlib.ticker import NullLocator

        places = [self._flat(v) for v in self.values]
        span = max(places) - min(places)
        room = max(0.1 * span, 0.25 * self._gap()) if span else 0.5
        if self.kind == "names":
            room = 0.5
        ends = (min(places) - room, max(places) + room)
        if self.kind == "log":
            axes.set_xscale("log")
            ends = (10 ** ends[0], 10 ** ends[1])
        axes.set_xlim(*ends)
        texts = [_shown(v) for v in self.values]
        kept = self._kept(places, texts, width)
        axes.set_xticks([self.at(self.values[i]) for i in kept], [texts[i] for i in kept])
        axes.xaxis.set_minor_locator(NullLocator())
        longest = max((len(texts[i]) for i in kept), default=0)
        if self.kind == "names" and longest * len(kept) > 44 * width:
            axes.tick_params(axis="x", labelrotation=25)
            for tick in axes.get_xticklabels():
                tick.set_horizontalalignment("right")
                tick.set_rotation_mode("anchor")

    def _kept(self, places: Sequence[float], texts: Sequence[str], width: float) -> list[int]:
        if self.kind == "names":
            return list(range(len(places)))
        span = max(places) - min(places)
        order = sorted(range(len(places)), key=places.__getitem__)
        kept: list[int] = []
        for i in order:
            least = CLOSE * span * max(len(texts[i]), 2) / 3 / width
            if not kept or places[i] - places[kept[-1]] >= least:
                kept.append(i)
        if kept[-1] != order[-1]:
            # The end of an axis says more than its last neighbour.
            kept[-1 if len(kept) > 1 else len(kept) :] = [order[-1]]
        return kept

    def _gap(self) -> float:
        """Return the smallest distance between two values."""
        places = sorted(self._flat(v) for v in self.values)
        gaps = [b - a for a, b in itertools.pairwise(places) if b > a]
        return min(gaps, default=0.0)

    def _ends(self) -> tuple[float, float]:
        numbers = [float(v) for v in self.values]
        return min(numbers), max(numbers)

    def _flat(self, value: Value) -> float:
        return math.log10(float(value)) if self.kind == "log" else self.at(value)


def _number(value: Value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Value) -> str:
    text = named(value)
    return plain(text if len(text) <= 20 else text[:19] + "…")
