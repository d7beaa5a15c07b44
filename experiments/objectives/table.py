"""The matrix of objectives and strategies from the run folders on disk; nothing is run here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.harness import Found, load, percent, place, values
from experiments.objectives.study import BASELINES, SEEDS, SETTING, STRATEGIES
from fedkd.distill.objectives.base import objectives
from fedkd.engine.folder import read_records
from fedkd.metrics.intervals import mean_t, paired_t
from fedkd.types import Estimate

LOCAL, TUNED = "local-only", "fedavg + fine-tuning"
COLUMNS = (
    "user accuracy",
    "over kl",
    f"over {LOCAL}",
    f"over {TUNED}",
    "global accuracy",
    "ECE",
    "ECE over kl's",
    "as its teacher",
    "KL to teacher",
    "MB up / round",
    "MB down / round",
    "step x kl",
)
Row = dict[str, Any]


def write(runs: Path, out: Path) -> None:
    """Write ``results.md`` and ``results.json`` below ``out`` from whatever has finished."""
    labels = {s: [f"{s}, {o}" for o in objectives.names()] for s in STRATEGIES}
    every = [*BASELINES, *(label for group in labels.values() for label in group)]
    found = {label: load(runs / "main", SETTING, label, SEEDS) for label in every}
    found = {label: seeds for label, seeds in found.items() if seeds}
    taught = {label: agreements(runs, label, seeds) for label, seeds in found.items()}
    file = out / "cost.json"
    cost = json.loads(file.read_text(encoding="utf-8"))["step"] if file.exists() else {}
    made = {label: record(label, found, taught[label], cost) for label in found}
    text = ["# Objectives in three strategies\n", preamble(), "## Baselines\n"]
    text.append(table([label for label in BASELINES if label in made], made))
    for strategy, group in labels.items():
        text += [f"## {strategy}\n", table([label for label in group if label in made], made)]
    data = {
        label: {k: vars(v) if isinstance(v, Estimate) else v for k, v in entry.items()}
        for label, entry in made.items()
    }
    (out / "results.md").write_text("\n".join(text), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("\n".join(text))


def preamble() -> str:
    """Say what every number is, and with which options it was made."""
    return (
        "Made by `python -m experiments.objectives.study`; Fashion-MNIST, 6,000 training images "
        "over 20 clients (Dirichlet, alpha 0.1) and 600 more as the public pool, a perceptron "
        "128-64, 20 rounds. Every cell had four trials on a seed of its own, chosen by validation "
        "accuracy after 10 rounds: `tuned.json` has all scores. Per cent: mean over 3 seeds (each "
        "draws another partition) with the 95 % t interval; differences are paired by seed. *User "
        "accuracy* is the mean over clients on their own test data, mean of the last three "
        "evaluations; *global* is the balanced test set, last round; *ECE* is that of all clients' "
        "test examples together, in 15 bins of equal width, last round. *As its teacher*: on how "
        "many of the examples that were taught the student answers as its soft target says, right "
        "after the last distillation, mean over clients, or of the server's student (FedDF); *KL "
        "to teacher* likewise, in nats, both at the temperature that was tuned: compare it within "
        "a temperature. Bytes are tensors of training, all participants together. *Step x kl*: a "
        "whole step of training by the objective, on one core (`cost.json`, which has the "
        "objective alone as well).\n"
    )


def agreements(runs: Path, label: str, seeds: Found) -> dict[str, dict[int, float]]:
    """Return top-1 agreement and KL by seed, where somebody was taught."""
    found: dict[str, dict[int, float]] = {"top1": {}, "kl": {}}
    for seed in seeds:
        records = list(read_records(place(runs / "main", SETTING, label, seed) / "metrics.jsonl"))
        for name, by_seed in found.items():
            each = [r.value for r in records if f"agreement/{name}" in r.metric and r.client >= 0]
            shared = [r.value for r in records if r.metric.startswith(f"server/agreement/{name}")]
            if each or shared:
                by_seed[seed] = float(np.mean(each or shared))
    return found


def record(
    label: str, rows: dict[str, Found], taught: dict[str, dict[int, float]], cost: dict[str, float]
) -> Row:
    """Return the estimates of one row."""
    strategy, _, objective = label.partition(", ")

    def each(key: str, rule: str = "mean_last_k", of: str = label) -> dict[int, float]:
        found = rows.get(of, {})
        predict = next(iter(found.values()))["headline"]["predict"] if found else ""
        return values(found, predict, key, "composite", rule)

    def over(base: str, key: str = "user_accuracy", rule: str = "mean_last_k") -> Estimate | None:
        mine, other = each(key, rule), each(key, rule, base)
        both = sorted(set(mine) & set(other))
        if len(both) < 2 or base == label:
            return None
        return paired_t([mine[s] for s in both], [other[s] for s in both])

    def spread(by_seed: dict[int, float]) -> Estimate | None:
        return mean_t(list(by_seed.values())) if by_seed else None

    def per_round(key: str) -> float:
        found = rows[label].values()
        return float(np.mean([s["bytes"].get(key, 0.0) / s["rounds"] for s in found]))

    same = f"{strategy}, kl"
    return {
        "seeds": len(rows[label]),
        "user": spread(each("user_accuracy")),
        "over_kl": over(same) if objective else None,
        "over_local": over(LOCAL),
        "over_ft": over(TUNED),
        "global": spread(each("global_accuracy", "last")),
        "ece": spread(each("ece", "last")),
        "ece_over_kl": over(same, "ece", "last") if objective else None,
        "top1": spread(taught["top1"]),
        "kl": spread(taught["kl"]),
        "bytes_up": per_round("bytes_up"),
        "bytes_down": per_round("bytes_down"),
        "cost": cost.get(objective),
    }


def table(labels: list[str], made: dict[str, Row]) -> str:
    """Return a table of some rows, best user accuracy first."""
    if not labels:
        return ""
    head = "| | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|\n"
    ordered = sorted(labels, key=lambda label: -made[label]["user"].value)
    return head + "".join(line(label, made[label]) for label in ordered)


def line(label: str, made: Row) -> str:
    """Return one row of a table."""
    signed: Callable[[Estimate | None], str] = lambda e: percent(e, sign=True)  # noqa: E731
    cells = [
        percent(made["user"]),
        signed(made["over_kl"]),
        signed(made["over_local"]),
        signed(made["over_ft"]),
        percent(made["global"]),
        percent(made["ece"]),
        signed(made["ece_over_kl"]),
        percent(made["top1"]),
        "-" if made["kl"] is None else f"{made['kl'].value:.3f}",
        f"{made['bytes_up'] / 1e6:.3f}",
        f"{made['bytes_down'] / 1e6:.3f}",
        "-" if made["cost"] is None else f"{made['cost']:.1f}",
    ]
    note = "" if made["seeds"] == len(SEEDS) else f" ({made['seeds']} of {len(SEEDS)} seeds)"
    return f"| {label.partition(', ')[2] or label}{note} | " + " | ".join(cells) + " |\n"
