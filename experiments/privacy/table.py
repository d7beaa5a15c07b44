"""The privacy study's tables from the run folders on disk; nothing is run here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import load, percent, place, values
from experiments.privacy.figure import draw
from experiments.privacy.study import (
    ALONE,
    DELTA,
    EPSILONS,
    PROFILES,
    ROUNDS,
    SEEDS,
    TUNING_EPSILON,
    column,
    epsilons,
    labels,
)
from fedkd.engine.folder import read_records
from fedkd.metrics.intervals import mean_t, paired_t
from fedkd.types import Estimate

FINE_TUNED, CONSTANT = "fedavg + fine-tuning", "constant T = 1"
TITLES = {
    "client": "A client's whole contribution is hidden (client level, central noise)",
    "swing": "Swing distillation beside constant temperature, at equal noise (FedMD)",
    "example": "One training example is hidden (clients train by DP-SGD)",
}
FIGURE = "![User accuracy by epsilon](epsilon.png)\n"
BySeed = dict[int, float]
Home = tuple[str, str]
"""The profile and the label that a row's runs are filed under."""
Source = Callable[[str, str, float], BySeed]
"""One number a seed of (profile, row, epsilon); empty where nothing has finished."""


def write(runs: Path, out: Path) -> None:
    """Write tables, numbers and the figure below ``out`` from whatever has finished."""
    text, data = ["# Results of the privacy study\n", preamble(), FIGURE], {}
    for profile in PROFILES:
        body, data[profile] = section(profile, runs)
        if body:
            text += [f"## {TITLES[profile]}\n", *body]
    draw(data, out / "epsilon")
    (out / "results.md").write_text("\n".join(text), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("\n".join(text))


def preamble() -> str:
    """Say what every number is, and with which options it was made."""
    return (
        "Made by `python -m experiments.privacy.study`; Fashion-MNIST, 10,000 training images over "
        "100 clients (Dirichlet, alpha 0.3) and 500 more as the public pool, 3,000 test images; a "
        f"perceptron with 32 hidden units, {ROUNDS} rounds of two local epochs (at example level "
        "of three steps on all of a client's data), every client in every round. Every method had "
        "two (example level) or three trials at epsilon 8 on a seed of their own, chosen by "
        "validation accuracy, and keeps these options at every epsilon: `tuned.json` has all "
        "scores. Accuracies in per cent: mean over 3 seeds (each draws another partition) with the "
        "95 % t interval; differences are paired by seed. *User accuracy* is the unweighted mean "
        "over clients on their own test data, composite read-out, mean of the last two rounds; "
        f"*global* is the balanced test set, last round. delta = {DELTA:g}; epsilon inf is the "
        "same run without noise (at example level gradients are still clipped). "
        f"`{ALONE}` releases nothing, so that it needs no noise: its one "
        "number stands in every column. What stays on a client is trained without noise at client "
        "level; at example level all training is DP-SGD but fine-tuning, which stays there too.\n"
    )


def section(profile: str, runs: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the tables of a profile and their numbers."""

    def user(home: str, label: str, epsilon: float) -> BySeed:
        return accuracy(runs, home, label, epsilon, "user_accuracy", "mean_last_k")

    def everywhere(home: str, label: str, epsilon: float) -> BySeed:
        return accuracy(runs, home, label, epsilon, "global_accuracy", "last")

    def agreed(home: str, label: str, epsilon: float) -> BySeed:
        return consensus(runs, home, label, epsilon)

    data: dict[str, Any] = {}
    body = add(data, profile, "User accuracy", user)
    for base in (ALONE, FINE_TUNED, *([CONSTANT] if profile == "swing" else [])):
        body += add(data, profile, f"User accuracy over `{base}`", user, base)
    body += add(data, profile, "Global accuracy", everywhere)
    body += add(data, profile, "Accuracy of the released consensus on the pool", agreed)
    return body + (mechanism(profile, runs) if body else []), data


def add(
    data: dict[str, Any], profile: str, title: str, source: Source, base: str | None = None
) -> list[str]:
    """Return one table, rows by columns of epsilon, and keep its numbers in ``data``."""
    rows = every_row(profile)
    columns = [e for e in EPSILONS if any(e in epsilons(profile, k) for k in labels(profile))]
    found = {}
    for row, home in rows.items():
        if row != base:
            made = [estimate(source, home, rows[base] if base else None, e) for e in columns]
            if any(made):
                found[row] = made
    if not found.keys() - {ALONE, FINE_TUNED, CONSTANT}:
        return []
    data[title] = {
        row: {column(e): vars(m) if m else None for e, m in zip(columns, made, strict=True)}
        for row, made in found.items()
    }
    head = "| | " + " | ".join(f"{e:g}" for e in columns) + " |\n"
    rule = "|---" * (len(columns) + 1) + "|\n"
    lines = [
        f"| {row} | " + " | ".join(percent(m, sign=base is not None) for m in made) + " |\n"
        for row, made in found.items()
    ]
    return [f"### {title}, by epsilon\n", head + rule + "".join(lines)]


def every_row(profile: str) -> dict[str, Home]:
    """Return each row with where its runs are; the baselines are in every table."""
    rows: dict[str, Home] = {}
    if profile != "client":  # Whoever releases nothing trains as it likes.
        rows[ALONE] = ("client", ALONE)
    if profile == "swing":
        rows |= {FINE_TUNED: ("client", FINE_TUNED), CONSTANT: ("client", "fedmd")}
    return rows | {label: (profile, label) for label in labels(profile)}


def estimate(source: Source, home: Home, base: Home | None, epsilon: float) -> Estimate | None:
    """Return a cell's mean over seeds, or its paired difference to a baseline's cell."""
    mine = source(*home, epsilon)
    if base is None:
        return mean_t(list(mine.values())) if mine else None
    other = source(*base, epsilon)
    both = sorted(set(mine) & set(other))
    return paired_t([mine[s] for s in both], [other[s] for s in both]) if both else None


def accuracy(runs: Path, profile: str, label: str, epsilon: float, key: str, rule: str) -> BySeed:
    """Return one accuracy a seed; ``local-only`` has the same at any epsilon."""
    at = math.inf if label == ALONE else epsilon
    found = load(runs / profile, column(at), label, SEEDS)
    predict = next(iter(found.values()))["headline"]["predict"] if found else ""
    return values(found, predict, key, "composite", rule)


def consensus(runs: Path, profile: str, label: str, epsilon: float) -> BySeed:
    """Return the accuracy of the released consensus on the pool, mean over its rounds, by seed."""
    made = {}
    for seed in SEEDS:
        folder = place(runs / profile, column(epsilon), label, seed)
        if (folder / "summary.json").exists():
            records = read_records(folder / "metrics.jsonl")
            rounds = [r.value for r in records if r.metric == "consensus/accuracy"]
            if rounds:
                made[seed] = float(np.mean(rounds))
    return made


def mechanism(profile: str, runs: Path) -> list[str]:
    """Say in words what was claimed at epsilon 8 and what was not, by the ledgers of seed 0."""
    claims, uncovered = [], {}
    for label in labels(profile):
        file = place(runs / profile, column(TUNING_EPSILON), label, 0) / "privacy.json"
        if file.exists():
            report: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            claim = report["sentence"].split("; not covered")[0]
            claims.append(f"- `{label}`: {claim}; noise multiplier {noise(report)}")
            uncovered.update(dict.fromkeys(report["not_covered"]))
    if not claims:
        return []
    text = "\n".join([*claims, "", "Not covered:", "", *(f"- {what}" for what in uncovered)])
    return [f"### What was claimed at epsilon {TUNING_EPSILON:g}, on seed 0\n", f"{text}\n"]


def noise(report: Mapping[str, Any]) -> str:
    """Return the noise multipliers that a ledger counted, smallest to largest."""
    histories = [report["global"]["history"]] + [c["history"] for c in report["clients"].values()]
    found: Sequence[float] = sorted({round(row[0], 2) for h in histories for row in h})
    if not found:
        return "none"
    return f"{found[0]:g}" if len(found) == 1 else f"{found[0]:g} to {found[-1]:g}"
