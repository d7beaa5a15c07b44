"""Who takes part: how often each client did, as shades; models of availability differ in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from fedkd.report.charts.canvas import Canvas, where
from fedkd.report.charts.sheet import plain, sheet
from fedkd.report.drawn import Drawn

MOST_ROWS = 24
SHADE = "#1f86c9"
"""A blue that can be seen on white and on black."""


def attendance(canvas: Canvas) -> Iterator[Drawn]:
    """Draw the share of rounds in which each client took part, one row for a cohort history.

    Labels with the same seed have the same cohorts, as a rule, and are one row; a label whose
    cohorts differ (methods in which everybody trains) has its own.
    """
    found = _histories(canvas)
    if not found or all(share.min() == 1 for _, share in found):
        return
    shown = found[:MOST_ROWS]
    clients = max(len(share) for _, share in shown)
    table = np.full((len(shown), clients), np.nan)
    for i, (_, share) in enumerate(shown):
        table[i, : len(share)] = share
    name, most = "attendance", float(np.nanmax(table)) or 1.0
    with sheet(canvas.folder / name, 0, height=0.6 + 0.16 * len(shown), wide=True) as made:
        (axes,) = made.panels
        axes.grid(False)
        image = axes.imshow(
            table, aspect="auto", cmap=_shades(), vmin=0, vmax=most, interpolation="none"
        )
        axes.set_yticks(range(len(shown)), [plain(title) for title, _ in shown], fontsize=6.5)
        axes.set_xlabel("client")
        axes.locator_params(axis="x", integer=True)
        bar = made.figure.colorbar(
            image,
            ax=axes,
            ticks=[0, most],
            shrink=0.9,
            pad=0.01,
            aspect=max(4, 2 * len(shown)),
            fraction=0.03,
        )
        bar.ax.set_yticklabels(["never", f"{100 * most:.0f} %"], fontsize=6.5)
        bar.outline.set_visible(False)
    lost = sum(int(c.lost.sum()) for g in canvas.groups for c in g.curves)
    played = sum(int(c.took_part.sum()) for g in canvas.groups for c in g.curves)
    never = f"Of all that took part, {100 * lost / played:.1f} % of the uploads never came." * (
        lost > 0
    )
    left = f"{len(found) - MOST_ROWS} rows are not drawn." if len(found) > MOST_ROWS else ""
    caption = (
        "Share of the rounds in which each client trained, by its number; of each group the first "
        "seed is shown. Labels with the same cohorts are one row, and a label is named where they "
        f"differ. In brackets: the mean over clients, and the least. {never} {left}"
    )
    yield canvas.drawn(name, "Who takes part", caption, "clients")


def _histories(canvas: Canvas) -> list[tuple[str, np.ndarray]]:
    """Return title and share (K,) of every cohort history that differs, points in order."""
    found: list[tuple[str, np.ndarray]] = []
    for point in canvas.collection.points():
        here = [g for g in canvas.groups if g.point == point]
        parts: list[tuple[str, np.ndarray]] = []
        for group in here:
            part = group.curves[0].took_part
            if part.size and not any(np.array_equal(part, other) for _, other in parts):
                parts.append((group.label, part))
        several = {k: v for k, v in point.items() if len(canvas.collection.axes[k]) > 1}
        place = where(several).replace("participation ", "")
        for label, part in parts:
            share = part.mean(axis=0)
            name = ", ".join(filter(None, (place, label if len(parts) > 1 else "")))
            found.append((f"{name or 'all'} ({share.mean():.2f}, {share.min():.2f})", share))
    return found


def _shades() -> Any:
    """Return a colour that goes from nothing to full, so that it can stand on any ground."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("held", [to_rgba(SHADE, a) for a in (0.03, 1.0)])
