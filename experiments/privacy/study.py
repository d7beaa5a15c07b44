"""Accuracy against epsilon: what a guarantee costs each way of sharing knowledge.

    python -m experiments.privacy.study           # tune, run, write the tables: everything
    python -m experiments.privacy.study tune      # two or three trials a method, on another seed
    python -m experiments.privacy.study main      # all cells; seed 0 of everything comes first
    python -m experiments.privacy.study table     # the tables from what is on disk
    python -m experiments.privacy.study quick     # digits, a few rounds: what the tests freeze

``--profile`` picks one of ``client`` (a client's whole contribution is hidden by central noise),
``swing`` (temperatures at equal noise) and ``example`` (clients train by DP-SGD). Runs are
independent and resumable: an interrupted command does only what is missing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import Changes, Job, place

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TUNING_SEED, TUNING_EPSILON = 100, 8.0
EPSILONS = (1.0, 2.0, 4.0, 8.0, math.inf)
FEW = {"swing": (4.0, 8.0, math.inf)}
DELTA = 1e-3
"""A tenth of 1 / clients, and below 1 / examples of the largest client."""
ROUNDS = 8
LR = "clients.training.lr"
NORM = "privacy.clipping.norm"

BASE: dict[str, Any] = {
    "rounds": ROUNDS,
    "model": {"name": "mlp", "hidden": [32]},
    "data": {
        # 500 of them are the public pool, which is taken from every method alike.
        "source": {"name": "fashion-mnist", "limit": 10500, "test_limit": 3000},
        "partition": {"name": "dirichlet", "alpha": 0.3, "min_examples": 20},
        "public": {"size": 500},
    },
    "clients": {
        "count": 100,
        "participation": {"scheme": "full"},
        "training": {"batch_size": 32, "epochs": 2, "lr": 0.1},
    },
    # The last two rounds are judged, and their mean is reported.
    "evaluate": {"every": ROUNDS - 1, "last_k": 2},
    "engine": {"executor": "serial", "checkpoint_every": 1000},
}

FEDAVG = {"name": "fedavg", "weighting": "uniform"}
FINE_TUNED = {"name": "fedavg-ft", "weighting": "uniform"}
FEDD2S = {"name": "fedd2s", "weighting": "uniform", "share": "mean"}
FEDMD = {
    "name": "fedmd",
    "digest_loss": "kl",
    "fusion": "mean-probs",
    "digest_batch_size": 32,
    "subset": 50,
}
FD = {"name": "fd", "share": "mean"}
DP_ALONE = "local-only, DP-SGD"
# The whole of a client's data in each of three steps a round: at a hundred examples a client, what
# sampling would save in noise is lost in signal, and all clients need the same noise.
STEPS: Changes = {
    "clients.training.batch_size": 512,
    "clients.training.steps": 3,
    "privacy.dp_sgd.grad_sample_mode": "ghost",
}

# profile -> label -> (fixed options, the values that are tried).
METHODS: dict[str, dict[str, tuple[Changes, dict[str, list[Any]]]]] = {
    "client": {
        "local-only": ({"strategy": "local-only"}, {LR: [0.05, 0.1, 0.2]}),
        "fedavg": ({"strategy": FEDAVG}, {NORM: [0.3, 1.0, 2.0]}),
        "fedavg + fine-tuning": ({"strategy": FINE_TUNED}, {NORM: [0.3, 1.0, 2.0]}),
        "fedd2s": ({"strategy": FEDD2S}, {NORM: [0.3, 1.0, 2.0]}),
        "fedmd": ({"strategy": FEDMD}, {"strategy.subset": [10, 25, 50]}),
        "fd": ({"strategy": FD}, {"strategy.gamma": [0.1, 0.3, 1.0]}),
    },
    "example": {
        DP_ALONE: ({"strategy": "local-only", **STEPS}, {LR: [0.2, 0.4]}),
        "fedavg": ({"strategy": FEDAVG, **STEPS}, {LR: [0.2, 0.4]}),
        "fedavg + fine-tuning": (
            {"strategy": {**FINE_TUNED, "finetune_epochs": 10}, **STEPS},
            {LR: [0.2, 0.4]},
        ),
        "fedd2s": ({"strategy": FEDD2S, **STEPS}, {LR: [0.2, 0.4]}),
        "fedmd": ({"strategy": FEDMD, **STEPS}, {LR: [0.2, 0.4]}),
    },
}
ALONE = "local-only"
"""Releases nothing, so that no noise is needed at any epsilon: it is run once."""
TABLES = ("fedd2s",)
"""At example level these release class means as well, by noisy sums that have to be paid for."""
TABLE_SHARE = 0.25
"""Of the budget (in 1 / noise multiplier^2) that goes to these sums; DP-SGD gets the rest."""

# Softening of FedMD's targets, beside the client profile's T = 1: one T for all examples, or each.
SWING: dict[str, Changes] = {
    "constant T = 3": {"strategy.temperature": 3.0},
    "constant T = 10": {"strategy.temperature": 10.0},
    "swing, T 1 to 10": {"privacy.swing.map": "adaptive"},
    "reverse, T 10 to 1": {"privacy.swing.map": "reverse"},
}
GKD = {"name": "fedgkd", "coefficient": 0.5}
# No epsilon: distillation from the last global models on the client's own data.
HEURISTIC: dict[str, Changes] = {
    "fedgkd, T = 1": {"strategy": GKD},
    "fedgkd, swing": {"strategy": GKD, "privacy.swing.map": "adaptive"},
}
PROFILES = ("client", "swing", "example")


def plan(profile: str, label: str, epsilon: float) -> Changes:
    """Return the privacy options of a cell; infinity is no noise, all else being equal.

    At client level that is no plan at all; at example level clipping stays, since three steps on
    unclipped gradients at the learning rates that suit clipped ones are another method.
    """
    if label == ALONE or (math.isinf(epsilon) and profile != "example"):
        return {}
    if math.isinf(epsilon):
        chosen: Changes = {"privacy.noise_multiplier": 0.0, "privacy.delta": DELTA}
    else:
        chosen = {"privacy.epsilon": epsilon, "privacy.delta": DELTA}
    if profile != "example":
        return {"privacy.unit": "client", "privacy.accountant": "prv", **chosen}
    chosen |= {"privacy.unit": "example", "privacy.accountant": "rdp"}
    if label in TABLES:
        chosen["privacy.release.mode"] = "dpsgd+release"
        chosen["privacy.release.noise_multiplier"] = (
            0.0 if math.isinf(epsilon) else table_noise(epsilon)
        )
    return chosen


@cache
def table_noise(epsilon: float, rounds: int = ROUNDS) -> float:
    """Return the noise of one release of class sums a round that takes its share of the budget."""
    from fedkd.privacy.accounting import History, calibrate

    whole = calibrate(epsilon, DELTA, lambda z: History([(z, 1.0, rounds)]), "rdp")
    return round(whole / math.sqrt(TABLE_SHARE), 2)


def epsilons(profile: str, label: str) -> tuple[float, ...]:
    """Return the columns in which a method has a run of its own."""
    if label == ALONE or label in HEURISTIC:
        return (math.inf,)
    if label == DP_ALONE:
        return (TUNING_EPSILON,)
    return FEW.get(profile, EPSILONS)


def labels(profile: str) -> list[str]:
    """Return the rows of a profile."""
    return [*SWING, *HEURISTIC] if profile == "swing" else list(METHODS[profile])


def column(epsilon: float) -> str:
    """Return the name of an epsilon.

    >>> column(8.0), column(math.inf)
    ('eps 8', 'eps inf')
    """
    return f"eps {epsilon:g}"


def tune(profiles: Sequence[str], runs: Path, workers: int) -> None:
    """Run the trials of every method at epsilon 8; write the best of each, by validation."""
    found: dict[str, Any] = {}
    for profile in profiles:
        if profile not in METHODS:
            continue
        trials = {}
        for label, (fixed, own) in METHODS[profile].items():
            extra = plan(profile, label, TUNING_EPSILON)
            trials[label] = harness.trials({**fixed, **extra}, own)
        out = runs / f"tuned-{profile}.json"
        harness.tune(trials, BASE, {"seed": TUNING_SEED}, runs / f"{profile}-tuning", out, workers)
        found[profile] = json.loads(out.read_text(encoding="utf-8"))
    file = HERE / "tuned.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**before, **found}, indent=1) + "\n", encoding="utf-8")


def tuned(profile: str, label: str) -> Changes:
    """Return the options that a method was tuned to, without the plan it was tuned under."""
    found = json.loads((HERE / "tuned.json").read_text(encoding="utf-8"))
    options: Changes = found[profile][label]["options"]
    return {k: v for k, v in options.items() if k not in plan(profile, label, TUNING_EPSILON)}


def cell(profile: str, label: str, epsilon: float) -> Changes:
    """Return all options of a cell, but the seed."""
    if label in HEURISTIC:
        return HEURISTIC[label]
    if profile == "swing":
        return {**tuned("client", "fedmd"), **SWING[label], **plan(profile, label, epsilon)}
    return {**tuned(profile, label), **plan(profile, label, epsilon)}


def jobs(profiles: Sequence[str], runs: Path, seeds: Sequence[int] = SEEDS) -> list[Job]:
    """Return every run: seed 0 of all profiles first, so that every table fills early."""
    found = []
    for seed in seeds:
        for profile in profiles:
            for epsilon in reversed(EPSILONS):
                for label in labels(profile):
                    if epsilon not in epsilons(profile, label):
                        continue
                    options = {**cell(profile, label, epsilon), "seed": seed}
                    name = f"{profile} / {column(epsilon)} / {label} / {seed}"
                    folder = place(runs / profile, column(epsilon), label, seed)
                    found.append(Job(name, BASE, options, folder))
    return found


QUICK: dict[str, Any] = {
    "rounds": 3,
    "model": {"name": "mlp", "hidden": [16]},
    "data": {
        "source": {"name": "digits", "limit": 440, "test_limit": 200},
        "partition": {"name": "dirichlet", "alpha": 0.3, "min_examples": 20},
        "public": {"size": 40},
    },
    "clients": {
        "count": 6,
        "participation": {"scheme": "full"},
        "training": {"lr": 0.2, "batch_size": 16, "epochs": 2},
    },
    "evaluate": {"every": 1, "last_k": 2, "global_per_class": 10},
    "engine": {"executor": "serial", "device": "cpu", "checkpoint_every": 1000},
}


def quick_jobs(runs: Path) -> list[Job]:
    """Return one short run of every method under every plan on digits."""
    found = []
    for profile in PROFILES:
        if profile == "swing":
            rows: dict[str, Changes] = {
                label: {"strategy": FEDMD, **own} for label, own in SWING.items() if "T 1" in label
            } | {label: own for label, own in HEURISTIC.items() if "swing" in label}
        else:
            rows = {label: fixed for label, (fixed, _) in METHODS[profile].items()}
        for label, options in rows.items():
            extra = {} if label in HEURISTIC else plan(profile, label, TUNING_EPSILON)
            folder = place(runs / "quick", profile, label, 0)
            found.append(Job(f"{profile} / {label}", QUICK, {**options, **extra}, folder))
    return found


def main() -> None:
    """Read the command line."""
    from experiments.privacy.table import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = ["all", "tune", "main", "table", "quick"]
    parser.add_argument("step", choices=steps, nargs="?", default="all")
    parser.add_argument("--profile", choices=PROFILES)
    parser.add_argument("--runs", type=Path, default=Path("runs/privacy-study"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    profiles = [given.profile] if given.profile else list(PROFILES)
    if given.step in ("all", "tune"):
        tune(profiles, given.runs, given.workers)
    if given.step in ("all", "main"):
        harness.run_all(jobs(profiles, given.runs), given.workers)
    if given.step == "quick":
        harness.run_all(quick_jobs(given.runs), given.workers)
    if given.step in ("all", "main", "table"):
        write(given.runs, HERE)


if __name__ == "__main__":
    main()
