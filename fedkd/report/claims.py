"""What the runs of a comparison claim about privacy: each claim once, with what it leaves open.

An epsilon is never read alone: unit, adjacency, sampling, delta and accountant stand beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkd.privacy.ledger import Claim
from fedkd.report.runs import RunView
from fedkd.types import Estimate


@dataclass(frozen=True)
class Claims:
    """Pairs of labels and what is said of them; ``labels`` is empty where it holds for all runs.

    ``sentences`` what is claimed, ``not_covered`` what no claim covers, ``stopped`` which runs
    ended before their last round since their budget was spent.
    """

    sentences: tuple[tuple[str, str], ...] = ()
    not_covered: tuple[tuple[str, str], ...] = ()
    stopped: tuple[tuple[str, str], ...] = ()

    def lines(self) -> list[str]:
        """Return claims and stops as one line of text each."""
        return [_line(*pair) for pair in (*self.sentences, *self.stopped)]

    def open_lines(self) -> list[str]:
        """Return what is not covered as one line of text each."""
        return [f"{text} (only: {labels})" if labels else text for labels, text in self.not_covered]


def claims(runs: Mapping[str, Sequence[RunView]]) -> Claims:
    """Return what the finished runs claim, by label; of several seeds the largest epsilon."""
    found = {label: views for label, views in runs.items() if views}
    said = {label: _sentence(views) for label, views in found.items()}
    protected = {label: views for label, views in found.items() if views[0].ledger}
    missing: dict[str, list[str]] = {}
    for label, views in protected.items():
        for item in (views[0].ledger or {})["not_covered"]:
            missing.setdefault(item, []).append(label)
    return Claims(
        sentences=_grouped(said, len(said)),
        not_covered=tuple(
            ("" if len(labels) == len(protected) else ", ".join(labels), item)
            for item, labels in missing.items()
        ),
        stopped=tuple(
            (f"{label}, seed {view.seed}" if len(views) > 1 else label, view.summary["stopped"])
            for label, views in found.items()
            for view in views
            if view.summary.get("stopped")
        ),
    )


def spent(runs: Sequence[RunView]) -> Estimate | None:
    """Return the largest epsilon over seeds; None where a run has no mechanism."""
    values = [epsilon_of(run.ledger) for run in runs if run.ledger]
    if not values or len(values) < len(runs):
        return None
    largest = max(values)
    method = "largest over seeds; no interval"
    return Estimate(largest, math.nan, math.nan, len(values), method)


def epsilon_of(ledger: Mapping[str, Any]) -> float:
    """Return the epsilon of a ``privacy.json``, where infinity is text."""
    return float(ledger["epsilon"])


def _sentence(runs: Sequence[RunView]) -> str:
    ledgers = [run.ledger for run in runs if run.ledger]
    if not ledgers:
        return str(runs[0].summary["privacy"])
    worst = max(ledgers, key=epsilon_of)
    claim = Claim(**{**worst["claim"], "not_covered": ()})
    several = len({epsilon_of(ledger) for ledger in ledgers}) > 1
    seen = max((epsilon_of(c) for c in worst["clients"].values()), default=0.0)
    return (
        claim.sentence(epsilon_of(worst))
        + claim.seen_by_all(epsilon_of(worst), seen)
        + ("; the largest over seeds" if several else "")
    )


def _grouped(said: Mapping[str, str], everything: int) -> tuple[tuple[str, str], ...]:
    labels: dict[str, list[str]] = {}
    for label, sentence in said.items():
        labels.setdefault(sentence, []).append(label)
    return tuple(
        ("" if len(names) == everything else ", ".join(names), sentence)
        for sentence, names in labels.items()
    )


def _line(labels: str, text: str) -> str:
    return f"{labels}: {text}" if labels else text
