"""What the study says about FedD2S's claims: speed and fairness, paired by seed.

    python -m experiments.participation.claims runs/participation-sweep

Writes ``claims.md`` beside this file. Differences in percentage points with Student's t over seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedkd.metrics.fairness import std, worst_share
from fedkd.metrics.intervals import paired_t
from fedkd.report.collection import RATIO, Collection, collect
from fedkd.report.curves import Curves

EARLY, LAST = 21, 3
LABELS = ("fedd2s, every 1", "fedd2s, every 5", "fedd2s, every 10", "fedd2s, never")
OTHERS = ("local-only", "fedavg + fine-tuning", "fd")


def over_clients(curves: Curves, of: Callable[[np.ndarray], float]) -> float:
    """Return a measure over clients, mean of the last judged rounds."""
    return float(np.mean([of(row[~np.isnan(row)]) for row in curves.accuracy[-LAST:]]))


def early(curves: Curves) -> float:
    """Return the mean user accuracy of the judged rounds up to round 21: how fast it starts."""
    return float(np.mean(curves.mean()[curves.rounds <= EARLY]))


MEASURES: dict[str, Callable[[Curves], float]] = {
    f"User accuracy, mean of the judged rounds up to round {EARLY} (speed)": early,
    "User accuracy, mean of the last judged rounds": lambda c: over_clients(c, np.mean),
    "Worst 10 % of the clients": lambda c: over_clients(c, worst_share),
    "Standard deviation over clients (lower is more even)": lambda c: over_clients(c, std),
}


def table(found: Collection, of: Callable[[Curves], float]) -> list[str]:
    """Return the rows of one measure: FedD2S minus each other label, at each ratio."""
    ratios = found.axes[RATIO]
    rows = [
        "| difference | " + " | ".join(f"{ratio:g}" for ratio in ratios) + " |",
        "|---|" + "--:|" * len(ratios),
    ]
    for other in OTHERS:
        for label in LABELS:
            cells = []
            for ratio in ratios:
                groups = [found.group(name, {RATIO: ratio}) for name in (label, other)]
                ours, theirs = ([100 * of(c) for c in group.curves] for group in groups if group)
                made = paired_t(ours, theirs)
                cells.append(f"{made.value:+.1f} [{made.low:+.1f}, {made.high:+.1f}]")
            rows.append(f"| {label} - {other} | " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    """Read the sweep and write the tables."""
    found = collect([Path(sys.argv[1])])
    text = ["# FedD2S against others, by participation ratio", ""]
    text += ["Percentage points, paired by seed, 95 % Student's t over three seeds.", ""]
    for title, of in MEASURES.items():
        text += [f"## {title}", "", *table(found, of), ""]
    Path(__file__).with_name("claims.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
