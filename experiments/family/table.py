"""The family's tables from the run folders on disk; nothing is run here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.family.study import HERE, PROFILES, SEEDS, variants
from experiments.harness import Found, load, percent, place, values
from fedkd.engine.folder import read_records
from fedkd.metrics.intervals import mean_t, paired_t
from fedkd.metrics.log import Log
from fedkd.types import Estimate

TITLES = {
    "family": "20 clients, 20 rounds, perceptron 128-64",
    "one-shot": "One round, 5 clients, 20 local epochs",
    "mixed": "Clients of three architectures (two perceptrons, a small CNN)",
}
COLUMNS = (
    "user accuracy",
    "over local-only",
    "over fedavg + fine-tuning",
    "global accuracy",
    "worst 10 %",
    "own read-out",
    "MB up / round",
    "MB down / round",
    "s / round",
)
PUBLISHED = {  # DENSE's table 1, Fashion-MNIST, 5 clients (third-party transcription)
    "fedavg": (41.69, 82.96, 83.72),
    "feddf": (43.58, 80.67, 84.67),
    "dense": (50.29, 83.96, 85.94),
}


def write(profiles: Sequence[str], runs: Path, out: Path) -> None:
    """Write ``results.md`` and ``results.json`` below ``out`` from whatever has finished."""
    text = ["# Results of the family study\n", preamble()]
    data: dict[str, Any] = {}
    for profile in PROFILES:
        body = [table(profile, setting, runs, data) for setting in PROFILES[profile]]
        if any(body):
            text += [f"## {TITLES[profile]}\n", *filter(None, body)]
    shapes = checks(runs)
    if shapes:
        text += ["## What papers agree on, and what held here\n", shapes]
    (out / "results.md").write_text("\n".join(text), encoding="utf-8")
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("\n".join(text))


def preamble() -> str:
    """Say what every number is, and with which options it was made."""
    file = HERE / "tuned.json"
    tuned = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    trials = sorted({len(entry["validation"]) for entry in tuned.values()})
    return (
        "Made by `python -m experiments.family.study`; Fashion-MNIST, 6,000 training images over "
        "the clients and 600 more as the public pool, 4,000 test images. Every method had "
        f"{' or '.join(map(str, trials))} trials (two learning rates, two values of its own "
        "option) on a seed of their own, chosen by validation accuracy: `tuned.json` has all "
        "scores. Accuracies in per cent: mean over 3 seeds (each draws another partition) with "
        "the 95 % t interval; differences are paired by seed. *User accuracy* is the unweighted "
        "mean over clients on their own test data, composite read-out, mean of the last three "
        "evaluations; *global* is the balanced test set, last round. Bytes are tensors of "
        "training, all participants together, a mean over the rounds; the pool is not counted. "
        "Seconds (main setting only) are the median round of four, without judging, one run after "
        "the other on one core: compare them with each other, not with other machines.\n"
    )


def table(profile: str, setting: str, runs: Path, data: dict[str, Any]) -> str:
    """Return one setting's table, best user accuracy first; nothing if nothing has finished."""
    rows = {label: load(runs / profile, setting, label, SEEDS) for label in variants(profile)}
    rows = {label: found for label, found in rows.items() if found}
    if not rows:
        return ""
    made = {label: record(label, rows) for label in rows}
    for label, entry in made.items():
        timed = seconds(place(runs / "time", setting, label, 0))
        if profile == "family" and timed is not None:
            entry["seconds"] = timed
    data.setdefault(profile, {})[setting] = {
        label: {k: vars(v) if isinstance(v, Estimate) else v for k, v in entry.items()}
        for label, entry in made.items()
    }
    head = "| method | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|\n"
    ordered = sorted(made, key=lambda label: -made[label]["user"].value)
    body = "".join(line(label, made[label]) for label in ordered)
    return f"### {setting}\n\n{head}{body}"


def record(label: str, rows: dict[str, Found]) -> dict[str, Any]:
    """Return the estimates of one row."""
    found = rows[label]
    predict = next(iter(found.values()))["headline"]["predict"]

    def each(
        key: str, readout: str = "composite", rule: str = "mean_last_k", of: Found = found
    ) -> dict[int, float]:
        by = next(iter(of.values()))["headline"]["predict"] if of else predict
        return values(of, by, key, readout, rule)

    def over(base: str) -> Estimate | None:
        mine, other = each("user_accuracy"), each("user_accuracy", of=rows.get(base, {}))
        both = sorted(set(mine) & set(other))
        if not both or base == label:
            return None
        return paired_t([mine[s] for s in both], [other[s] for s in both])

    def spread(by_seed: dict[int, float]) -> Estimate | None:
        return mean_t(list(by_seed.values())) if by_seed else None

    def per_round(key: str) -> float:
        return float(np.mean([s["bytes"].get(key, 0.0) / s["rounds"] for s in found.values()]))

    return {
        "seeds": len(found),
        "user": spread(each("user_accuracy")),
        "over_local": over("local-only"),
        "over_ft": over("fedavg + fine-tuning"),
        "global": spread(each("global_accuracy", rule="last")),
        "worst": spread(each("worst_share")),
        "own": spread(each("user_accuracy", "own")),
        "bytes_up": per_round("bytes_up"),
        "bytes_down": per_round("bytes_down"),
        "seconds": None,
    }


def seconds(folder: Path) -> float | None:
    """Return the median seconds of a round's training and aggregation, the first left out."""
    file = folder / "metrics.jsonl"
    if not (folder / "summary.json").exists():
        return None
    log = Log(1)
    log.add([r for r in read_records(file) if r.metric == "seconds"])
    each = list(log.series("seconds", "train").values())
    return float(np.median(each[1:] or each))


def line(label: str, made: dict[str, Any]) -> str:
    """Return one row of a table."""
    cells = [
        percent(made["user"]),
        percent(made["over_local"], sign=True),
        percent(made["over_ft"], sign=True),
        percent(made["global"]),
        percent(made["worst"]),
        percent(made["own"]),
        f"{made['bytes_up'] / 1e6:.3f}",
        f"{made['bytes_down'] / 1e6:.3f}",
        "-" if made["seconds"] is None else f"{made['seconds']:.2f}",
    ]
    note = "" if made["seeds"] == len(SEEDS) else f" ({made['seeds']} of {len(SEEDS)} seeds)"
    return f"| {label}{note} | " + " | ".join(cells) + " |\n"


def checks(runs: Path) -> str:
    """Return what the literature expects beside what was measured."""
    lines = []
    strong = {k: load(runs / "family", "alpha 0.1", k, SEEDS) for k in ("fd", "fedavg", "fedgen")}
    if strong["fd"] and strong["fedavg"]:
        moved = {
            k: np.mean([s["bytes"]["bytes_up"] + s["bytes"]["bytes_down"] for s in v.values()])
            for k, v in strong.items()
            if v
        }
        share = 100 * moved["fd"] / moved["fedavg"]
        lines.append(f"- `fd` moves {share:.2f} % of `fedavg`'s bytes (expected: under 1 %).\n")
    for setting in PROFILES["family"]:
        pair = [_global(runs / "family", setting, k) for k in ("fedgen", "fedavg")]
        if all(pair):
            text = percent(_difference(*pair), sign=True)
            lines.append(
                f"- `fedgen` over `fedavg`, global accuracy, {setting}: {text} points "
                "(expected: at least 0 under strong skew).\n"
            )
    for i, setting in enumerate(PROFILES["one-shot"]):
        pair = [_global(runs / "one-shot", setting, k) for k in ("dense", "fedavg")]
        if all(pair):
            published = PUBLISHED["dense"][i] - PUBLISHED["fedavg"][i]
            text = percent(_difference(*pair), sign=True)
            lines.append(
                f"- one-shot `dense` over one-shot `fedavg`, global accuracy, {setting}: {text} "
                f"points (published: {published:+.1f}, on another network and all the data).\n"
            )
    return "".join(lines)


def _global(runs: Path, setting: str, label: str) -> dict[int, float]:
    found = load(runs, setting, label, SEEDS)
    return values(found, "personal", "global_accuracy", "composite", "last")


def _difference(mine: dict[int, float], other: dict[int, float]) -> Estimate:
    both = sorted(set(mine) & set(other))
    return paired_t([mine[s] for s in both], [other[s] for s in both])
