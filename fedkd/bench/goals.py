"""What fedkd wants to reach, as data: ratios that a bench can measure, each with its limit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

from fedkd.bench.results import Entry, Outcome, Ratio, Result

BEST = ("auto", "thread", "process", "cohort")
Measure = Literal["ratio", "seconds", "peak", "value"]


@dataclass(frozen=True)
class Goal:
    """At most ``limit`` for one of ``ours``, against the best of ``others``, on the work ``work``.

    ``measure`` is the median ratio of seconds (``ratio``), seconds as such, the ratio of peak
    memory (``peak``), or the entry's value of that name (``value``).
    """

    id: str
    work: str
    ours: tuple[str, ...]
    others: tuple[str, ...]
    limit: float
    measure: Measure = "ratio"
    value: str = ""

    @property
    def what(self) -> str:
        """Which work, by whom."""
        return f"{self.work}: {' or '.join(self.ours)}"

    @property
    def against(self) -> str:
        """What it is measured against."""
        if self.measure in ("seconds", "value"):
            return self.value or "seconds"
        single = len(self.others) == 1 and "*" not in self.others[0]
        return ("" if single else "best of ") + ", ".join(self.others)


def _goals() -> list[Goal]:
    serial, hand, hand2 = ("serial",), ("bare",), ("bare:2",)
    ray, pfl = ("flower-ray*",), ("pfl*",)
    return [
        Goal("serial-cnn", "cnn K=10", serial, hand, 1.05),
        Goal("serial-mlp", "mlp K=10", serial, hand, 1.05),
        Goal("flower-grid-cnn", "cnn K=10", ("flower-grid",), hand, 1.05),
        Goal("flower-grid-mlp", "mlp K=10", ("flower-grid",), hand, 1.25),
        Goal("cnn-10", "cnn K=10", BEST, hand2, 0.60),
        Goal("cnn-50", "cnn K=50", BEST, hand2, 0.60),
        Goal("mlp-10", "mlp K=10", BEST, hand2, 0.24),
        Goal("mlp-50", "mlp K=50", BEST, hand2, 0.24),
        Goal("ray-mlp", "mlp K=10", BEST, ray, 0.06),
        Goal("ray-cnn", "cnn K=10", BEST, ray, 0.55),
        Goal("ray-tiny", "tiny N=K=1000", BEST, ray, 0.01),
        Goal("ray-whole", "whole mlp K=10", BEST, ray, 0.25),
        Goal("pfl-mlp", "mlp K=10", BEST, pfl, 0.33),
        Goal("pfl-cnn", "cnn K=10", BEST, pfl, 0.70),
        Goal("dp-cnn", "dp-step-cnn", ("ours",), ("plain",), 1.8),
        Goal("dp-mlp", "dp-step-mlp", ("ours",), ("plain",), 2.8),
        Goal("evaluate", "evaluate", ("ours",), ("one by one",), 0.33),
        Goal("memory-ray", "cnn K=10", BEST, ray, 0.40, "peak"),
        Goal("idle", "idle", ("idle client",), (), 1.1, "value", "bytes / its list of indices"),
        Goal("fedd2s", "fedd2s", ("fedd2s",), ("fedavg",), 1.35),
        Goal("help", "start-up", ("fedkd --help",), (), 0.4, "seconds"),
        Goal("first-round", "start-up", ("quick start, round 1",), (), 4.0, "seconds"),
    ]


GOALS = tuple(_goals())


def measured(result: Result, goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """Return every goal with what was measured for it.

    ``passed`` is None where nothing was, or only under load.
    """
    return [_one(goal, result.outcome(goal.work)) for goal in goals]


def _one(goal: Goal, outcome: Outcome | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": goal.id,
        "what": goal.what,
        "against": goal.against,
        "limit": goal.limit,
        "measured": None,
        "passed": None,
        "noisy": False,
    }
    if outcome is None or not standard(outcome):
        return row
    ours, others = _best(goal, outcome, goal.ours), _best(goal, outcome, goal.others)
    found: Ratio | float | None = None
    if ours is not None and goal.measure == "seconds":
        found = ours.median
    elif ours is not None and goal.measure == "value":
        found = ours.values.get(goal.value)
    elif ours is not None and others is not None and goal.measure == "ratio":
        found = outcome.ratio(ours.label, others.label)
    elif ours is not None and others is not None and ours.peak_mib and others.peak_mib:
        found = ours.peak_mib / others.peak_mib
    if found is None:
        return row
    value = found.median if isinstance(found, Ratio) else found
    timed = goal.measure in ("ratio", "seconds")
    noisy = timed and any(e is not None and e.status == "noisy" for e in (ours, others))
    row |= {
        "measured": dataclasses.asdict(found) if isinstance(found, Ratio) else {"median": value},
        "by": [e.label for e in (ours, others) if e is not None],
        # What was measured under load shows neither that a goal is reached nor that it is not.
        "passed": None if noisy else value <= goal.limit,
        "noisy": noisy,
    }
    return row


def standard(outcome: Outcome) -> bool:
    """Return whether a work is the one that goals speak of, not a small one for trying."""
    facts = outcome.facts
    if facts.get("source", "fashion-mnist") != "fashion-mnist":
        return False
    clients = 1000 if facts.get("kind") == "tiny" else 100
    return "kind" not in facts or facts.get("clients") == clients


def _best(goal: Goal, outcome: Outcome, patterns: Sequence[str]) -> Entry | None:
    """Return the contender among ``patterns`` that needs least."""
    found = [
        e for e in outcome.entries if any(fnmatch(e.label, p) for p in patterns) and _known(goal, e)
    ]

    def need(entry: Entry) -> float:
        return (entry.peak_mib or math.inf) if goal.measure == "peak" else entry.median

    return min(found, key=need, default=None)


def _known(goal: Goal, entry: Entry) -> bool:
    if goal.measure == "value":
        return goal.value in entry.values
    return entry.timed if goal.measure != "peak" else entry.peak_mib is not None
