"""The privacy study's figure: accuracy against epsilon, one panel a profile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.privacy.study import EPSILONS, column
from fedkd.report.style import colour, figure

PANELS = {
    "client": "A client is hidden\n(central noise)",
    "example": "One training example is hidden\n(DP-SGD)",
}
AT = dict(zip(EPSILONS, range(len(EPSILONS)), strict=True))
"""Places on an axis of equal steps: epsilons double, and the last is infinite."""


def draw(data: Mapping[str, Any], stem: Path) -> list[Path]:
    """Draw user accuracy with its intervals by epsilon, and return the files."""
    made: list[Path] = []
    with figure(3.6, stem, made) as (drawn, single):
        single.remove()
        drawn.set_size_inches(7.2, 3.6)
        panels = drawn.subplots(1, len(PANELS), sharey=True)
        names: dict[str, int] = {}
        for axes, (profile, title) in zip(panels, PANELS.items(), strict=True):
            rows = data.get(profile, {}).get("User accuracy", {})
            for row in rows:
                names.setdefault(row, len(names))
            for row, cells in rows.items():
                _line(axes, row, cells, names[row])
            axes.set_title(title)
            axes.set_xticks(list(AT.values()), ["inf" if math.isinf(e) else f"{e:g}" for e in AT])
            axes.set_xlabel("epsilon")
        panels[0].set_ylabel("user accuracy, %")
        handles = {}
        for axes in panels:
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return made


def _line(axes: Any, row: str, found: Mapping[str, Any], index: int) -> None:
    known = [(AT[e], found[column(e)]) for e in EPSILONS if found.get(column(e))]
    if not known:
        return
    x = [place + 0.06 * (index - 3) for place, _ in known]
    y = [100 * cell["value"] for _, cell in known]
    spread: list[list[float]] | None = [
        [100 * abs(c["value"] - c[end]) for _, c in known] for end in ("low", "high")
    ]
    if any(math.isnan(v) for side in spread for v in side):
        spread = None
    axes.errorbar(x, y, yerr=spread, capsize=2, label=row, **colour(index))
