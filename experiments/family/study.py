"""All strategies side by side: one loop, one set of data, one byte meter, equal tuning budgets.

    python -m experiments.family.study           # tune, run, write the tables: everything
    python -m experiments.family.study tune      # four trials a method, on a seed of its own
    python -m experiments.family.study main      # all methods, settings and seeds
    python -m experiments.family.study time      # seconds a round, one run after the other
    python -m experiments.family.study table     # the tables from what is on disk
    python -m experiments.family.study quick     # digits, a few rounds: what the tests freeze

``--profile`` picks one of ``family`` (20 clients), ``one-shot`` (5 clients, a round) and ``mixed``
(clients of different architectures). Runs are independent and resumable: an interrupted command
does only what is missing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import harness
from experiments.harness import Changes, Job, place

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
TUNING_SEED, TUNING_ROUNDS = 100, 20
LR = "clients.training.lr"
LRS = (0.07, 0.2)
DECAY = {"clients.training.weight_decay": [0.0, 1e-3]}
SERVER_LR = {"strategy.server_lr": [1e-3, 3e-4]}
LOW_LR = {"strategy.server_lr": [3e-4, 1e-4]}

BASE: dict[str, Any] = {
    "rounds": 20,
    "model": {"name": "mlp", "hidden": [128, 64]},
    "data": {
        # 600 of them are the public pool, which is taken from every method alike.
        "source": {"name": "fashion-mnist", "limit": 6600, "test_limit": 4000},
        "partition": {"name": "dirichlet", "alpha": 0.1, "min_examples": 20},
        "public": {"size": 600},
    },
    "clients": {"count": 20, "training": {"batch_size": 32}},
    "evaluate": {"every": 4, "last_k": 3},
    "engine": {"executor": "serial", "checkpoint_every": 1000},
}
ONE_SHOT = {"rounds": 1, "clients.training.epochs": 20}
"""One round with as many local epochs as the others have rounds: equal local work."""

# label -> (fixed options, the two values of the method's own option that are tried at each lr).
METHODS: dict[str, tuple[Changes, dict[str, list[Any]]]] = {
    "local-only": ({"strategy": "local-only"}, DECAY),
    "fedavg": ({"strategy": "fedavg"}, DECAY),
    "fedavg + fine-tuning": ({"strategy": "fedavg-ft"}, {"strategy.finetune_epochs": [1, 3]}),
    "centralized": ({"strategy": "centralized"}, DECAY),
    "fedprox": ({"strategy": "fedprox"}, {"strategy.mu": [0.01, 0.1]}),
    "fedper": ({"strategy": "fedper"}, {"strategy.personal_layers": [1, 2]}),
    "lg-fedavg": ({"strategy": "lg-fedavg"}, {"strategy.shared_layers": [1, 2]}),
    "ditto": ({"strategy": "ditto"}, {"strategy.lam": [0.1, 1.0]}),
    "fedd2s": ({"strategy": "fedd2s"}, {"strategy.kd_weight": [0.5, 1.5]}),
    "fd": ({"strategy": "fd"}, {"strategy.gamma": [0.1, 1.0]}),
    "fd + weights": (
        {"strategy": {"name": "fd", "share_weights": True}},
        {"strategy.gamma": [0.1, 1.0]},
    ),
    "fedproto": ({"strategy": "fedproto"}, {"strategy.lam": [0.1, 1.0]}),
    "fedhkd": ({"strategy": "fedhkd"}, {"strategy.gamma": [0.05, 0.5]}),
    "fedmd": ({"strategy": "fedmd"}, {"strategy.digest_epochs": [1, 3]}),
    "ds-fl": ({"strategy": "ds-fl"}, {"strategy.era_temperature": [0.1, 0.5]}),
    "dho": ({"strategy": "dho"}, {"strategy.lam": [0.5, 0.8]}),
    "fedgkt": ({"strategy": "fedgkt"}, {"strategy.alpha": [0.3, 1.0]}),
    "fedcache": ({"strategy": "fedcache"}, {"strategy.beta": [0.5, 1.5]}),
    "fedntd": ({"strategy": "fedntd"}, {"strategy.beta": [0.3, 1.0]}),
    "fedgkd": ({"strategy": "fedgkd"}, {"strategy.coefficient": [0.1, 0.5]}),
    "fml": ({"strategy": "fml"}, {"strategy.alpha": [0.5, 0.8]}),
    "fedkd-wu2022": ({"strategy": "fedkd-wu2022"}, {"strategy.kd_weight": [0.3, 1.0]}),
    "feddf": ({"strategy": "feddf"}, SERVER_LR),
    "feddf, generated": ({"strategy": {"name": "feddf", "inputs": "generator"}}, SERVER_LR),
    "fedgen": ({"strategy": "fedgen"}, {"strategy.alpha": [1.0, 10.0]}),
    "fedftg": ({"strategy": "fedftg"}, LOW_LR),
    "dfrd": ({"strategy": "dfrd"}, LOW_LR),
    "fedavg, one shot": ({"strategy": "fedavg", **ONE_SHOT}, DECAY),
    "dense, one shot": ({"strategy": "dense", **ONE_SHOT}, SERVER_LR),
    "co-boosting, one shot": ({"strategy": "co-boosting", **ONE_SHOT}, SERVER_LR),
}
# With the options that their parent was tuned to: how much does the fusion rule matter?
FUSED: dict[str, tuple[str, Changes]] = {
    f"{label}, class-counts": (method, {"strategy.fusion": "class-counts"})
    for label, method in (("feddf", "feddf"), ("dense, one shot", "dense, one shot"))
}

# Five clients and one round, as in the published comparison; options as tuned for twenty clients.
FEW: Changes = {"clients.count": 5, **ONE_SHOT}
ONE_SHOT_METHODS: dict[str, tuple[str, Changes]] = {
    "local-only": ("local-only", FEW),
    "fedavg": ("fedavg, one shot", FEW),
    "fedavg + fine-tuning": ("fedavg + fine-tuning", FEW),
    "feddf": ("feddf", {**FEW, "strategy.server_steps": 400}),
    "dense": ("dense, one shot", FEW),
    "dense, class-counts": ("dense, one shot", {**FEW, "strategy.fusion": "class-counts"}),
    "co-boosting": ("co-boosting, one shot", FEW),
}
MIXED: Changes = {
    "clients.models": [
        {"name": "mlp", "hidden": [128, 64]},
        {"name": "mlp", "hidden": [64]},
        {"name": "cnn", "channels": [6, 12], "hidden": 64},
    ]
}
ALPHAS = {f"alpha {a}": {"data.partition.alpha": a} for a in (0.1, 0.3, 0.5)}
PROFILES: dict[str, dict[str, Changes]] = {
    "family": {k: ALPHAS[k] for k in ("alpha 0.1", "alpha 0.5")},
    "one-shot": ALPHAS,
    "mixed": {"alpha 0.1": MIXED},
}
MIXED_METHODS = (
    "local-only",
    "fd",
    "fedproto",
    "fedmd",
    "ds-fl",
    "fedcache",
    "fml",
    "feddf",
    "dfrd",
)


def variants(profile: str) -> Mapping[str, tuple[str, Changes]]:
    """Return what a profile compares: label -> (whose tuned options, what differs)."""
    if profile == "one-shot":
        return ONE_SHOT_METHODS
    labels = MIXED_METHODS if profile == "mixed" else tuple(METHODS)
    same: dict[str, tuple[str, Changes]] = {label: (label, {}) for label in labels}
    return same if profile == "mixed" else {**same, **FUSED}


def tune(runs: Path, workers: int) -> None:
    """Run four trials of every method and write the best of each, by validation accuracy."""
    trials = {
        method: harness.trials(fixed, {LR: LRS, **own}) for method, (fixed, own) in METHODS.items()
    }
    extra = {"seed": TUNING_SEED, "evaluate.every": 2}
    for method, options in trials.items():
        if "rounds" not in METHODS[method][0]:
            trials[method] = [{**o, "rounds": TUNING_ROUNDS} for o in options]
    harness.tune(trials, BASE, extra, runs, HERE / "tuned.json", workers)


def jobs(profile: str, runs: Path) -> list[Job]:
    """Return every run of a profile: settings, seeds, methods."""
    tuned = json.loads((HERE / "tuned.json").read_text(encoding="utf-8"))
    found = []
    for (setting, changes), seed in itertools.product(PROFILES[profile].items(), SEEDS):
        for label, (method, own) in variants(profile).items():
            chosen = {k: v for k, v in tuned[method]["options"].items() if k != "rounds"}
            rounds = METHODS[method][0].get("rounds", BASE["rounds"])
            options = {**chosen, "rounds": rounds, **changes, **own, "seed": seed}
            folder = place(runs / profile, setting, label, seed)
            found.append(Job(f"{profile} / {setting} / {label} / {seed}", BASE, options, folder))
    return found


def timed_jobs(runs: Path) -> list[Job]:
    """Return a few rounds of every method of the main setting, to be run one after the other."""
    setting = "alpha 0.1"
    found = []
    for job in jobs("family", runs):
        _, here, label, seed = job.name.split(" / ")
        # A one-shot run is one long round: its seconds cannot be compared with a round's.
        if here == setting and seed == "0" and "one shot" not in label:
            changes = {**job.changes, "rounds": 4, "evaluate.every": 100}
            folder = place(runs / "time", setting, label, 0)
            found.append(Job(f"time / {label}", BASE, changes, folder))
    return found


QUICK: dict[str, Any] = {
    "rounds": 3,
    "model": {"name": "mlp", "hidden": [32, 16]},
    "data": {
        "source": {"name": "digits", "limit": 440, "test_limit": 200},
        "partition": {"name": "dirichlet", "alpha": 0.3},
        "public": {"size": 40},
    },
    "clients": {"count": 5, "training": {"lr": 0.1, "batch_size": 16, "epochs": 2}},
    "evaluate": {"every": 1, "last_k": 2, "global_per_class": 10},
    "engine": {"executor": "serial", "device": "cpu", "checkpoint_every": 1000},
}
LIGHT = {
    "strategy.server_steps": 20,
    "strategy.generator_steps": 5,
    "strategy.generator_width": 4,
    "strategy.synthesis_epochs": 4,
    "strategy.generated": 128,
}
"""Less work on the server, for methods that have these options."""


def quick_jobs(runs: Path) -> list[Job]:
    """Return one short run of every method on digits."""
    from fedkd.config import experiment, override
    from fedkd.engine.setup import make_strategy

    found = []
    for label, (fixed, _) in METHODS.items():
        table = json.loads(json.dumps(QUICK))
        for key, value in fixed.items():
            override(table, key, value)
        known = vars(make_strategy(experiment(table).strategy))
        light = {k: v for k, v in LIGHT.items() if k.split(".")[1] in known}
        options = {**{k: v for k, v in fixed.items() if k not in ONE_SHOT}, **light}
        if "rounds" in fixed:
            options |= {"rounds": 1, "clients.training.epochs": 6}
        found.append(Job(label, QUICK, options, place(runs / "quick", "digits", label, 0)))
    return found


def main() -> None:
    """Read the command line."""
    from experiments.family.table import write

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    steps = ["all", "tune", "main", "time", "table", "quick"]
    parser.add_argument("step", choices=steps, nargs="?", default="all")
    parser.add_argument("--profile", choices=list(PROFILES))
    parser.add_argument("--runs", type=Path, default=Path("runs/family-study"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    profiles = [given.profile] if given.profile else list(PROFILES)
    if given.step in ("all", "tune"):
        tune(given.runs, given.workers)
    if given.step in ("all", "main"):
        for profile in profiles:
            harness.run_all(jobs(profile, given.runs), given.workers)
    if given.step in ("all", "time"):
        harness.run_all(timed_jobs(given.runs), 1)
    if given.step == "quick":
        harness.run_all(quick_jobs(given.runs), given.workers)
    if given.step in ("all", "main", "time", "table"):
        write(profiles, given.runs, HERE)


if __name__ == "__main__":
    main()
