"""Every distillation objective in three strategies: equal tuning budgets, one set of data.

    python -m experiments.objectives.study           # tune, run, write the table: everything
    python -m experiments.objectives.study tune      # four trials a cell, on a seed of its own
    python -m experiments.objectives.study main      # all cells and seeds
    python -m experiments.objectives.study table     # the table from what is on disk

A cell is an objective in FedMD, FedDF or FedD2S. Runs are independent and resumable: an interrupted
command does only what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import Changes, Job, place
from fedkd.distill.objectives.base import objectives

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TUNING_SEED, TUNING_ROUNDS = 100, 10
SETTING = "alpha 0.1"
LR = "clients.training.lr"

BASE: dict[str, Any] = {
    "rounds": 20,
    "model": {"name": "mlp", "hidden": [128, 64]},
    "data": {
        # 600 of them are the public pool, which is taken from every method alike.
        "source": {"name": "fashion-mnist", "limit": 6600, "test_limit": 4000},
        "partition": {"name": "dirichlet", "alpha": 0.1, "min_examples": 20},
        "public": {"size": 600},
    },
    "clients": {"count": 20, "training": {"batch_size": 32, "lr": 0.1}},
    "evaluate": {"every": 4, "last_k": 3},
    "engine": {"executor": "serial", "checkpoint_every": 1000},
}
TEMPERATURE = {"strategy.temperature": [1.0, 4.0]}
STRATEGIES: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "fedmd": ("strategy.digest_loss", {**TEMPERATURE, "strategy.digest_lr": [0.03, 0.1]}),
    "feddf": ("strategy.objective", {**TEMPERATURE, "strategy.server_lr": [1e-3, 3e-4]}),
    "fedd2s": ("strategy.objective", {**TEMPERATURE, "strategy.kd_weight": [0.3, 1.0]}),
}
"""Where a strategy's objective is named, and the two options whose values are tried."""
LRS = [0.1, 0.2]
DECAY = {"clients.training.weight_decay": [0.0, 1e-3]}
BASELINES: dict[str, tuple[str, dict[str, list[Any]]]] = {
    "local-only": ("local-only", {LR: LRS, **DECAY}),
    "fedavg": ("fedavg", {LR: LRS, **DECAY}),
    "fedavg + fine-tuning": ("fedavg-ft", {LR: LRS, "strategy.finetune_epochs": [1, 3]}),
}


def cells() -> dict[str, list[Changes]]:
    """Return the four trials of each cell, ``<strategy>, <objective>``, and of each baseline."""
    found = {
        label: harness.trials({"strategy": {"name": name}}, own)
        for label, (name, own) in BASELINES.items()
    }
    for (strategy, (key, own)), objective in itertools.product(
        STRATEGIES.items(), objectives.names()
    ):
        fixed: Changes = {"strategy": {"name": strategy}, key: objective}
        found[f"{strategy}, {objective}"] = harness.trials(fixed, own)
    return found


def tune(runs: Path, workers: int) -> None:
    """Run four trials of every cell and write the best of each, by validation accuracy."""
    extra = {"seed": TUNING_SEED, "rounds": TUNING_ROUNDS, "evaluate.every": 2}
    harness.tune(cells(), BASE, extra, runs, HERE / "tuned.json", workers)


def jobs(runs: Path) -> list[Job]:
    """Return every cell on every seed, all cells of a seed before the next."""
    tuned = json.loads((HERE / "tuned.json").read_text(encoding="utf-8"))
    return [
        Job(
            f"{label} / {seed}",
            BASE,
            {**tuned[label]["options"], "seed": seed},
            place(runs / "main", SETTING, label, seed),
        )
        for seed, label in itertools.product(SEEDS, cells())
    ]


def main() -> None:
    """Read the command line."""
    from experiments.objectives.table import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = ["all", "tune", "main", "table"]
    parser.add_argument("step", choices=steps, nargs="?", default="all")
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives-study"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if given.step in ("all", "tune"):
        tune(given.runs, given.workers)
    if given.step in ("all", "main"):
        harness.run_all(jobs(given.runs), given.workers)
    write(given.runs, HERE)


if __name__ == "__main__":
    main()
