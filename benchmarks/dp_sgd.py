"""Time of a DP-SGD step beside a plain one, as ratios from alternating runs.

    python benchmarks/dp_sgd.py --passes 7 --steps 40 --batch 64 --out dp_sgd.json

Images of Fashion-MNIST, the one training loop, one thread; each pass runs every mode
once, in turn, on the same data. Private modes get Poisson batches of the
same expected size, so their batches differ in size while the plain ones do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import fit
from fedkd.clients.terms import Supervised
from fedkd.clients.training import Training
from fedkd.config import experiment
from fedkd.data.federated import Split
from fedkd.engine.setup import load_data
from fedkd.models.base import build
from fedkd.rng import Rng
from fedkd.types import Task

TASK = Task(name="fashion-mnist", input_shape=(1, 28, 28), classes=10)
MODES: dict[str, DpSgd | None] = {
    "plain": None,
    "hooks": DpSgd(1.0, mode="hooks"),
    "functorch": DpSgd(1.0, mode="functorch"),
    "ghost": DpSgd(1.0, mode="ghost"),
    "bookkeeping": DpSgd(1.0, mode="bookkeeping"),
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {}),
    "mlp-64": ("mlp", {"hidden": [64]}),
    "cnn": ("cnn", {}),
}


def data(n: int) -> Split:
    """Return n training images with labels, in the format in which the engine holds them."""
    source = {"name": "fashion-mnist", "limit": n, "test_limit": 100}
    table = {"data": {"source": source, "partition": "iid", "validation": 0.0}}
    table["clients"] = {"count": 1}
    return load_data(experiment(table))[0].client(0).train


def seconds(model: str, dp: DpSgd | None, split: Split, training: Training) -> float:
    """Return the seconds a step of one fit of a fresh network."""
    name, options = NETWORKS[model]
    net = build(name, options, TASK, Rng(0))
    start = time.perf_counter()
    result = fit(net, split, [Supervised()], training, 0.01, Rng(0), dp)
    return (time.perf_counter() - start) / result.steps


def compare(model: str, passes: int, steps: int, batch: int, modes: list[str]) -> dict[str, object]:
    """Time the modes in turn, pass by pass; return medians and the ratios to plain training."""
    split, training = data(600), Training(steps=steps, batch_size=batch)
    chosen = {name: MODES[name] for name in MODES if name in ("plain", *modes)}
    for dp in chosen.values():
        seconds(model, dp, split, Training(steps=2, batch_size=batch))
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    for i in range(passes):
        for name, dp in chosen.items():
            taken[name].append(seconds(model, dp, split, training))
        print(
            model, f"pass {i + 1}/{passes}", {n: f"{1e3 * s[-1]:.2f} ms" for n, s in taken.items()}
        )
    ratios = {}
    for name in list(chosen)[1:]:
        each = [a / b for a, b in zip(taken[name], taken["plain"], strict=True)]
        ratios[f"{name} / plain"] = {
            "median": statistics.median(each),
            "low": min(each),
            "high": max(each),
            "n": len(each),
        }
    return {
        "milliseconds_a_step": {n: 1e3 * statistics.median(s) for n, s in taken.items()},
        "ratios": ratios,
    }


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=7)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, object] = {
        "passes": given.passes,
        "steps_a_pass": given.steps,
        "torch": torch.__version__,
        "threads": 1,
    }
    for batch in given.batch:
        for model in given.models:
            found = compare(model, given.passes, given.steps, batch, given.modes)
            result[f"{model}, expected batch {batch}"] = found
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
