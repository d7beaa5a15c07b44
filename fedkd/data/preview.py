"""A picture of a partition: who holds how much of which class, or of text, before training.

A heat map reads well from 5 to 100 and more clients and for any number of classes; shades of one
hue, safe for the colour-blind and in print, replace the ten hues that stacked bars would need.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.data.federated import Federation

WRITTEN_CELLS = 260
WRITTEN_BARS = 30
TICKS = 25


def plot_holdings(
    federation: Federation, path_stem: Path, title: str = "", planted: Sequence[int] = ()
) -> list[Path]:
    """Draw who trains on what: by class, or in rows of text, which have none.

    ``planted``: how many of each client's rows of text are canaries. Files are as of
    :func:`plot_labels`.
    """
    if not federation.task.sequence:
        return plot_labels(federation, federation.dataset.class_names, path_stem, title)
    unit = f"training rows of {federation.task.input_shape[0]} tokens"
    return plot_rows(federation.counts().sum(1), path_stem, title, unit, planted)


def plot_rows(
    rows: np.ndarray,
    path_stem: Path,
    title: str = "",
    unit: str = "training rows",
    planted: Sequence[int] = (),
) -> list[Path]:
    """Draw the training rows of each client, ``rows (clients,)``; write a PNG and a PDF.

    One bar a client, of which the upper part are ``planted`` ones; numbers on few bars.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    clients = len(rows)
    put = np.array(planted) if len(planted) else np.zeros(clients, dtype=np.int64)
    figure = Figure(figsize=(min(max(5.0, 2.0 + 0.3 * clients), 13.0), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_sizes(axes, rows, rows - put).set_in_layout(True)
    if put.any():
        axes.bar(np.arange(clients), put, bottom=rows - put, color="#e69f00", label="canaries")
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    if clients <= WRITTEN_BARS:
        for k, n in enumerate(rows):
            axes.annotate(
                f"{n}", (k, n), (0, 3), textcoords="offset points", ha="center", fontsize=7,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2},
            )  # fmt: skip
    axes.set_ylabel(unit)
    axes.set_xlabel("client")
    axes.tick_params(axis="x", labelbottom=True, bottom=True)
    axes.set_xticks(np.arange(0, clients, _step(clients)))
    return _written(figure, path_stem, title)


def plot_labels(
    shown: Federation | np.ndarray,
    class_names: Sequence[str],
    path_stem: Path,
    title: str = "",
) -> list[Path]:
    """Draw the training examples of each client and class; write a PNG and a PDF.

    Above: each client's number of training examples. Below: a heat map, one column for a client and
    one row for a class, on a logarithmic scale; white is none. Small maps carry the numbers.

    Args:
        shown: a federation, or counts ``(clients, classes)``.
        class_names: one name for each class; numbers are used where there are none.
        path_stem: where to write, without suffix; folders are made.
        title: what stands above.

    Returns:
        The files that were written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = shown.counts() if isinstance(shown, Federation) else np.asarray(shown)
    clients, classes = counts.shape
    names = list(class_names) or [str(c) for c in range(classes)]
    width = min(max(5.0, 2.5 + 0.3 * clients), 13.0)
    height = min(max(3.6, 1.9 + 0.28 * classes), 12.0)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.0, height - 1.6], width_ratios=[60, 1])
    sizes = figure.add_subplot(grid[0, 0])
    cells = figure.add_subplot(grid[1, 0], sharex=sizes)
    _draw_sizes(sizes, counts.sum(1))
    image = _draw_cells(cells, counts, names)
    bar = figure.colorbar(image, cax=figure.add_subplot(grid[1, 1]))
    bar.set_label("training examples (log scale)")
    _mark_scale(bar, int(counts.max(initial=1)))
    return _written(figure, path_stem, title)


def _written(figure: Any, path_stem: Path, title: str) -> list[Path]:
    if title:
        figure.suptitle(title, fontsize=11)
    path_stem.parent.mkdir(parents=True, exist_ok=True)
    files = [path_stem.with_name(path_stem.name + suffix) for suffix in (".png", ".pdf")]
    figure.savefig(files[0], dpi=150)
    # Without dates the same partition gives the same file.
    figure.savefig(files[1], metadata={"CreationDate": None})
    return files


def _draw_sizes(axes: Any, totals: np.ndarray, own: np.ndarray | None = None) -> Any:
    """Draw a bar a client, of ``own`` examples where others go on top; return the mean's note."""
    bars = totals if own is None else own
    axes.bar(np.arange(len(totals)), bars, width=0.8, color="#5b6770", label="own")
    axes.set_ylabel("size")
    axes.set_ylim(0, max(1.0, 1.1 * totals.max()))
    axes.axhline(totals.mean(), color="#d55e00", linewidth=1, linestyle="--")
    note = axes.annotate(
        f"mean {totals.mean():.0f}",
        xy=(1.0, totals.mean()),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color="#d55e00",
    )
    note.set_in_layout(False)
    axes.tick_params(axis="x", which="both", labelbottom=False, bottom=False)
    axes.locator_params(axis="y", nbins=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return note


def _draw_cells(axes: Any, counts: np.ndarray, names: Sequence[str]) -> Any:
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    clients, classes = counts.shape
    top = max(2, int(counts.max(initial=1)))
    # The scale starts at a shade that differs from white, since a single example matters.
    shades = matplotlib.colormaps["Blues"](np.linspace(0.2, 1.0, 256))
    blues = LinearSegmentedColormap.from_list("held", shades)
    held = np.ma.masked_equal(counts.T, 0)
    image = axes.imshow(
        held, aspect="auto", cmap=blues, norm=LogNorm(1, top), interpolation="nearest"
    )
    axes.set_xlabel("client")
    axes.set_ylabel("class")
    axes.set_xticks(np.arange(0, clients, _step(clients)))
    every = -(-classes // 40)
    axes.set_yticks(np.arange(0, classes, every), list(names)[::every], fontsize=8)
    if clients <= 2 * TICKS:
        axes.set_xticks(np.arange(clients + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(classes + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    if clients * classes <= WRITTEN_CELLS:
        for (k, c), count in np.ndenumerate(counts):
            if count:
                shade = np.log(count) / np.log(top)
                colour = "white" if shade > 0.55 else "black"
                axes.text(k, c, count, ha="center", va="center", fontsize=6.5, color=colour)
    return image


def _step(clients: int) -> int:
    """Return every how many clients a tick stands, so that there are few."""
    least = -(-clients // TICKS)
    return next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, clients) if s >= least)


def _mark_scale(bar: Any, top: int) -> None:
    ticks = [t for e in range(7) for t in (10**e, 3 * 10**e) if t <= top]
    bar.set_ticks(ticks, labels=[f"{t:,}" for t in ticks])
    bar.ax.minorticks_off()
