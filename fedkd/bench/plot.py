"""The figure of a bench: ratios to the reference with their ranges, on a logarithmic axis."""

from __future__ import annotations

from pathlib import Path

from fedkd.bench.results import Entry, Outcome, Ratio, Result

KINDS = ("fedkd", "written by hand", "other frameworks")
ROW = 0.17


def draw(result: Result, stem: Path) -> bool:
    """Write ``stem`` as PNG, SVG and PDF; return False where nothing was timed."""
    from fedkd.report.charts.sheet import plain, sheet

    rows = lines(result)
    if not rows:
        return False
    kinds = sorted({kind for _, kind, _, _ in rows if kind is not None})
    low = min(r.low for _, _, r, _ in rows if r is not None)
    high = max(r.high for _, _, r, _ in rows if r is not None)
    with sheet(stem, len(kinds), height=ROW * len(rows) + 0.5, wide=True) as made:
        (axes,) = made.panels
        axes.set_xscale("log")
        axes.axvline(1.0, color="#777777", linewidth=1.0, zorder=1)
        texts = []
        for y, (text, kind, found, noisy) in enumerate(rows):
            texts.append(plain(text))
            if found is None or kind is None:
                continue
            made.bars(axes, kind, [y], [found.low], [found.high], across=True)
            made.points(axes, kind, KINDS[kind], [found.median], [y], hollow=[noisy])
            axes.annotate(
                f"{found.median:.2g}", (found.high, y), (5, 0), textcoords="offset points",
                va="center", fontsize=6.5,
            )  # fmt: skip
        axes.set_yticks(range(len(texts)), texts)
        for tick, (_, kind, _, _) in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if kind is None else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.8)
        axes.set_xlim(low / 1.5, high * 2)
        axes.grid(visible=False, axis="y")
        _decimal(axes)
        axes.set_xlabel("seconds / seconds of the reference in the same pass: median and range")
    return True


def _decimal(axes: object) -> None:
    """Write ticks as 0.1 and 10, not as powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.xaxis  # type: ignore[attr-defined]
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def lines(result: Result) -> list[tuple[str, int | None, Ratio | None, bool]]:
    """Return the rows from top to bottom: text, kind (None: a heading), ratio, whether noisy."""
    found: list[tuple[str, int | None, Ratio | None, bool]] = []
    for outcome in result.outcomes:
        made = [
            (entry.label, kind_of(entry, outcome), ratio, entry.status == "noisy")
            for entry in outcome.entries
            for ratio in [outcome.ratio(entry.label)]
            if ratio is not None and entry.label != outcome.reference
        ]
        if made:
            title = f"{outcome.name} (1: {outcome.reference})"
            found += [(title, None, None, False), *made]
    return found


def kind_of(entry: Entry, outcome: Outcome) -> int:
    """Return whose a contender is: ours, written by hand, or of another framework."""
    if entry.external:
        return 2
    return 1 if entry.backend.startswith("bare") or entry.label == outcome.reference else 0
