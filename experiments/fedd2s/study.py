"""The FedD2S study on Fashion-MNIST: every method tuned with the same budget, then three seeds.

    python -m experiments.fedd2s.study tune   # six trials a method, on a seed of its own
    python -m experiments.fedd2s.study main   # all variants, settings and seeds
    python -m experiments.fedd2s.study table  # the results from what is on disk

``--profile cnn`` and ``--profile dropping`` take the last two steps for two more questions.

Runs are independent and resumable: an interrupted command does only what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import Job, place

HERE = Path(__file__).parent
BASE: dict[str, Any] = {
    "rounds": 30,
    "data": {
        "source": {"name": "fashion-mnist", "limit": 6000, "test_limit": 4000},
        "partition": {"name": "dirichlet", "alpha": 0.1, "min_examples": 20},
    },
    "clients": {"count": 20, "training": {"batch_size": 32}},
    "evaluate": {"every": 3, "last_k": 3},
    "engine": {"executor": "serial", "checkpoint_every": 30},
}
# Every setting with the perceptron, and two more questions with its tuned options: does the main
# finding hold for a convolutional network, and where does dropping more than the head pay?
MLP = {"model": {"name": "mlp", "hidden": [200, 100, 100]}}
CNN = {"model": {"name": "cnn", "channels": [8, 16], "hidden": 64}}
PROFILES: dict[str, dict[str, Any]] = {"mlp": MLP, "cnn": CNN, "dropping": MLP}
SETTINGS: dict[str, dict[str, Any]] = {
    "alpha 0.1": {},
    "alpha 0.5": {"data.partition.alpha": 0.5},
    "150 images a client, alpha 0.1": {"data.source.limit": 3000},
}
SEEDS = (0, 1, 2)
TUNING_SEED, TUNING_ROUNDS = 100, 20
LRS = (0.05, 0.1, 0.2)
KD = {"strategy.kd_weight": [0.5, 1.5]}
AVERAGING = {"strategy": "fedd2s", "strategy.reading": "averaging", "strategy.first_drop": 1}
CUT = {"strategy": "fedd2s", "strategy.reading": "cut", "strategy.drops": 0}
UP_TO_CUT = {"strategy": "fedd2s", "strategy.reading": "up_to_cut", "strategy.drops": 0}
OUTPUT = {**UP_TO_CUT, "strategy.cuts": ["output"]}

# What is tuned: fixed options, and the grid of the method's own option (times LRS: six trials).
METHODS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "local-only": ({"strategy": "local-only"}, {"clients.training.weight_decay": [0.0, 1e-3]}),
    "label smoothing": ({"strategy": "local-only"}, {"strategy.label_smoothing": [0.1, 0.3]}),
    "fedavg": ({"strategy": "fedavg"}, {"clients.training.weight_decay": [0.0, 1e-3]}),
    "fedavg-ft": ({"strategy": "fedavg-ft"}, {"strategy.finetune_epochs": [1, 3]}),
    "fedper": ({"strategy": "fedper"}, {"strategy.personal_layers": [1, 2]}),
    "averaging": (AVERAGING, KD),
    "cut": (CUT, KD),
    "up_to_cut": (UP_TO_CUT, KD),
    "output": (OUTPUT, KD),
}

# What is compared: label -> (the method whose tuned options it takes, what differs).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "local-only": ("local-only", {}),
    "local-only, label smoothing": ("label smoothing", {}),
    "fedavg": ("fedavg", {}),
    "fedavg + fine-tuning": ("fedavg-ft", {}),
    "fedper": ("fedper", {}),
    "averaging: no dropping": ("averaging", {"strategy.drops": 0, "strategy.first_drop": 0}),
    "averaging: head personal": ("averaging", {}),
    "averaging: head drops after 5": (
        "averaging",
        {"strategy.first_drop": 6, "strategy.drops": 1},
    ),
    "averaging: all drop, every 8": (
        "averaging",
        {"strategy.first_drop": 0, "strategy.drop_every": 8, "strategy.drops": 9},
    ),
    "averaging: head personal, KD 0": ("averaging", {"strategy.kd_weight": 0.0}),
    "averaging: head personal, own labels": ("averaging", {"strategy.share": "own"}),
    "cut: no dropping": ("cut", {}),
    "cut: dropping every 10": (
        "cut",
        {"strategy.drops": 9, "strategy.drop_every": 10},
    ),
    "cut: KD 0": ("cut", {"strategy.kd_weight": 0.0}),
    "up to cut: no dropping": ("up_to_cut", {}),
    "up to cut: dropping every 8": (
        "up_to_cut",
        {"strategy.drops": 9, "strategy.drop_every": 8},
    ),
    "up to cut: KD 0": ("up_to_cut", {"strategy.kd_weight": 0.0}),
    "output only": ("output", {}),
    "output only, own labels": ("output", {"strategy.share": "own"}),
}


CONTROLS = (
    "averaging: head drops after 5",
    "averaging: head personal, own labels",
    "cut: KD 0",
    "up to cut: KD 0",
    "output only, own labels",
)
CONFIRMED = (
    "local-only",
    "local-only, label smoothing",
    "fedavg + fine-tuning",
    "fedper",
    "averaging: head personal",
    "averaging: head personal, KD 0",
    "averaging: all drop, every 8",
)
DROPPING = ("local-only", "fedper", "averaging: head personal", "averaging: all drop, every 8")
HARDER: dict[str, dict[str, Any]] = {
    "alpha 0.05": {"data.partition.alpha": 0.05},
    "30 % take part": {"clients.participation.ratio": 0.3},
    "60 rounds": {"rounds": 60, "evaluate.every": 6},
}


def settings(profile: str) -> dict[str, dict[str, Any]]:
    """Return the settings that a profile is run in."""
    return {"mlp": SETTINGS, "cnn": {"alpha 0.1": {}}, "dropping": HARDER}[profile]


def variants(profile: str, setting: str = "alpha 0.1") -> dict[str, tuple[str, dict[str, Any]]]:
    """Return the variants that a profile compares; controls are run in the main setting."""
    if profile == "mlp":
        left_out = CONTROLS if setting != "alpha 0.1" else ()
        return {label: variant for label, variant in VARIANTS.items() if label not in left_out}
    return {label: VARIANTS[label] for label in (CONFIRMED if profile == "cnn" else DROPPING)}


def tune(runs: Path, workers: int) -> None:
    """Run all trials and write the best of each method, by validation accuracy, to a file."""
    methods = {
        method: harness.trials({**MLP, **fixed}, {"clients.training.lr": LRS, **grid})
        for method, (fixed, grid) in METHODS.items()
    }
    extra = {"seed": TUNING_SEED, "rounds": TUNING_ROUNDS, "evaluate.every": 2}
    harness.tune(methods, BASE, extra, runs / "mlp", HERE / "tuned.json", workers)


def study(profile: str, runs: Path, workers: int) -> None:
    """Run every variant in every setting with every seed."""
    tuned = json.loads((HERE / "tuned.json").read_text(encoding="utf-8"))
    jobs = []
    for (setting, changes), seed in itertools.product(settings(profile).items(), SEEDS):
        for label, (method, own) in variants(profile, setting).items():
            chosen = tuned[method]["options"]
            options = {**PROFILES[profile], **chosen, **changes, **own, "seed": seed}
            folder = place(runs / profile, setting, label, seed)
            jobs.append(Job(f"{setting} / {label} / {seed}", BASE, options, folder))
    harness.run_all(jobs, workers)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=["tune", "main", "table"])
    parser.add_argument("--profile", choices=list(PROFILES), default="mlp")
    parser.add_argument("--runs", type=Path, default=Path("runs/fedd2s-study"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if given.step == "tune":
        tune(given.runs, given.workers)
    elif given.step == "main":
        study(given.profile, given.runs, given.workers)
    else:
        from experiments.fedd2s.table import write

        write(given.profile, given.runs, HERE)


if __name__ == "__main__":
    main()
