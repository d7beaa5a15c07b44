"""The study's tables from the run folders on disk; nothing is run here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from experiments.fedd2s.study import SEEDS, settings, variants
from experiments.harness import load as load_seeds
from experiments.harness import percent, values
from fedkd.metrics.intervals import mean_t, paired_t
from fedkd.types import Estimate

HEADER = (
    "| method | user accuracy | own | stale | over local-only | chosen on validation | std | "
    "worst 10 % | Jain | global | absent classes | MB up | MB down |\n" + "|---" * 13 + "|\n"
)
HEAD, UP = "averaging: head personal", "up to cut: no dropping"
CONTRASTS = (  # (label, predictor) minus (label, predictor)
    ((HEAD, "personal"), ("local-only", "personal")),
    ((HEAD, "personal"), ("local-only, label smoothing", "personal")),
    ((HEAD, "personal"), ("fedavg + fine-tuning", "personal")),
    ((HEAD, "personal"), ("fedper", "personal")),
    ((HEAD, "personal"), ("averaging: head personal, KD 0", "personal")),
    ((HEAD, "personal"), ("averaging: no dropping", "personal")),
    (("averaging: all drop, every 8", "personal"), (HEAD, "personal")),
    (("cut: dropping every 10", "personal"), ("cut: no dropping", "personal")),
    (("cut: dropping every 10", "global_head"), ("cut: no dropping", "global_head")),
    (("up to cut: dropping every 8", "personal"), (UP, "personal")),
    (("up to cut: dropping every 8", "ensemble"), (UP, "ensemble")),
    ((UP, "ensemble"), ("local-only", "personal")),
    ((UP, "ensemble"), (UP, "own_heads")),
    (("output only", "personal"), ("local-only", "personal")),
)
PREDICTORS = ("personal", "global_head", "ensemble", "own_heads")


def write(profile: str, runs: Path, out: Path) -> None:
    """Write ``results-<profile>.md`` and ``.json`` below ``out``."""
    text, data = [], {}
    for setting in settings(profile):
        rows = {label: load(runs / profile, setting, label) for label in variants(profile, setting)}
        rows = {label: found for label, found in rows.items() if found}
        if not rows:
            continue
        counts = sorted({len(found) for found in rows.values()})
        text.append(f"## {setting}\n\n{counts[-1]} seeds, mean of the last 3 evaluations.\n")
        text.append(HEADER + "".join(line(label, rows, p) for label in rows for p in PREDICTORS))
        data[setting] = {
            label: {p: record(label, rows, p) for p in PREDICTORS if has(rows[label], p)}
            for label in rows
        }
    text.insert(0, contrasts(profile, runs))
    text.insert(0, overview(data))
    (out / f"results-{profile}.md").write_text("\n".join(text), encoding="utf-8")
    (out / f"results-{profile}.json").write_text(
        json.dumps(data, indent=1) + "\n", encoding="utf-8"
    )
    print("\n".join(text))


def overview(data: dict[str, Any]) -> str:
    """Return one table over all settings: user accuracy and the paired gain over local-only."""
    rows: dict[str, dict[str, str]] = {}
    for setting, labels in data.items():
        for label, predictors in labels.items():
            for predict, made in predictors.items():
                name = label if predict == "personal" else f"{label} [{predict}]"
                gain = made["over_local_only"]
                shown = f" ({100 * gain['value']:+.1f})" if gain else ""
                rows.setdefault(name, {})[setting] = shown_value(made["user_accuracy"]) + shown
    head = "| method | " + " | ".join(data) + " |\n" + "|---" * (len(data) + 1) + "|\n"
    body = "".join(
        f"| {name} | " + " | ".join(cells.get(s, "-") for s in data) + " |\n"
        for name, cells in rows.items()
    )
    note = (
        "User accuracy in per cent (composite read-out), 95 % t interval over seeds, which draw "
        "another partition each; in brackets the mean paired difference to local-only.\n\n"
    )
    return f"## Overview\n\n{note}{head}{body}"


def contrasts(profile: str, runs: Path) -> str:
    """Return paired differences of user accuracy with their t interval over seeds."""
    every = settings(profile)
    found = {
        s: {label: load(runs / profile, s, label) for label in variants(profile, s)} for s in every
    }
    body = ""
    for (a, by_a), (b, by_b) in CONTRASTS:
        cells = []
        for rows in found.values():
            first = values(rows.get(a, {}), by_a, "user_accuracy", "composite", "mean_last_k")
            second = values(rows.get(b, {}), by_b, "user_accuracy", "composite", "mean_last_k")
            both = sorted(set(first) & set(second))
            gain = paired_t([first[k] for k in both], [second[k] for k in both]) if both else None
            cells.append(percent(gain) if gain else "-")
        if any(cell != "-" for cell in cells):
            body += f"| {a} [{by_a}] - {b} [{by_b}] | " + " | ".join(cells) + " |\n"
    head = "| difference | " + " | ".join(every) + " |\n" + "|---" * (len(every) + 1) + "|\n"
    note = "Percentage points of user accuracy, paired by seed, 95 % t interval.\n\n"
    return f"## Differences\n\n{note}{head}{body}"


def load(runs: Path, setting: str, label: str) -> dict[int, dict[str, Any]]:
    """Return the summaries of a variant's finished seeds."""
    return load_seeds(runs, setting, label, SEEDS)


def has(found: dict[int, dict[str, Any]], predict: str) -> bool:
    """Return whether a variant was judged by this predictor."""
    return all(predict in s["readouts"]["composite"] for s in found.values())


def record(label: str, rows: dict[str, Any], predict: str) -> dict[str, Any]:
    """Return the estimates of one row."""
    found = rows[label]

    def estimate(
        key: str, readout: str = "composite", rule: str = "mean_last_k"
    ) -> Estimate | None:
        each = values(found, predict, key, readout, rule)
        return mean_t(list(each.values())) if each else None

    mine = values(found, predict, "user_accuracy", "composite", "mean_last_k")
    base = values(
        rows.get("local-only", {}), "personal", "user_accuracy", "composite", "mean_last_k"
    )
    both = sorted(set(mine) & set(base))
    gain = paired_t([mine[s] for s in both], [base[s] for s in both]) if both else None
    sent = {
        way: mean_t([s["bytes"].get(f"bytes_{way}", 0.0) / 1e6 for s in found.values()])
        for way in ("up", "down")
    }
    made = {
        "user_accuracy": estimate("user_accuracy"),
        "own": estimate("user_accuracy", "own"),
        "stale": estimate("user_accuracy", "stale"),
        "over_local_only": gain if label != "local-only" else None,
        "chosen_on_validation": estimate("user_accuracy", rule="chosen_on_validation"),
        "std": estimate("std"),
        "worst_share": estimate("worst_share"),
        "jain": estimate("jain"),
        "global": estimate("global_accuracy", rule="last"),
        "absent": estimate("absent_accuracy", rule="last"),
        "mb_up": sent["up"],
        "mb_down": sent["down"],
    }
    return {key: vars(value) if value else None for key, value in made.items()}


def line(label: str, rows: dict[str, Any], predict: str) -> str:
    """Return one row of the table, or nothing."""
    if not has(rows[label], predict):
        return ""
    made = record(label, rows, predict)
    name = label if predict == "personal" else f"{label} [{predict}]"
    cells = [shown_value(made[k], k in ("user_accuracy", "own", "over_local_only")) for k in made]
    cells[-2:] = [f"{made[k]['value']:.2f}" for k in ("mb_up", "mb_down")]
    return f"| {name} | " + " | ".join(cells) + " |\n"


def shown_value(made: dict[str, Any] | None, interval: bool = True) -> str:
    """Return an estimate that was written as a table in per cent."""
    return percent(Estimate(**made) if made else None, interval)
