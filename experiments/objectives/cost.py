"""What each objective costs beside ``kl``: medians of alternating passes, one thread.

    python -m experiments.objectives.cost

``step`` is a whole step of the one loop, a perceptron 128-64 on Fashion-MNIST's shape taught by
the objective alone; ``alone`` is forward and backward of the objective, ten classes.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fedkd.clients.local import fit
from fedkd.clients.terms import Distil
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.objectives.base import Objective, objectives
from fedkd.distill.targets import SampleTargets
from fedkd.models.base import BlockNet
from fedkd.models.book import ModelBook
from fedkd.rng import Rng
from fedkd.types import Task

PASSES, STEPS, BATCH, CLASSES, TEMPERATURE = 40, 10, 64, 10, 2.0


def setting() -> tuple[Split, torch.Tensor, BlockNet]:
    """Return inputs with labels, soft targets and a network."""
    draw = torch.Generator().manual_seed(0)
    n = STEPS * BATCH
    task = Task(name="images", input_shape=(1, 28, 28), classes=CLASSES)
    net = ModelBook(task, {"m": ("mlp", {"hidden": [128, 64]})}, 0).make("m")
    data = Split(
        torch.randn(n, 1, 28, 28, generator=draw), torch.randint(0, CLASSES, (n,), generator=draw)
    )
    return data, torch.softmax(torch.randn(n, CLASSES, generator=draw), 1), net


def ratios(work: Callable[[Objective], None]) -> tuple[dict[str, float], float]:
    """Return what ``STEPS`` steps cost over ``kl``'s, and one of ``kl``'s in microseconds."""
    made = {name: objectives.get(name)() for name in objectives.names()}
    each: dict[str, list[float]] = {name: [] for name in made}
    for passed in range(PASSES + 1):
        for name, objective in made.items():
            begun = time.perf_counter()
            work(objective)
            if passed:  # the first warms up
                each[name].append(time.perf_counter() - begun)
    found = {
        name: statistics.median(t / k for t, k in zip(times, each["kl"], strict=True))
        for name, times in each.items()
    }
    return {n: round(r, 2) for n, r in found.items()}, 1e6 * statistics.median(each["kl"]) / STEPS


def main() -> None:
    """Time all objectives in turn, and write ``cost.json``."""
    torch.set_num_threads(1)
    data, probs, net = setting()
    training = Training(steps=STEPS, batch_size=BATCH)
    logits, few = torch.randn(BATCH, CLASSES), slice(0, BATCH)

    def step(objective: Objective) -> None:
        term = Distil(objective, SampleTargets(probs), TEMPERATURE, 1.0)
        fit(net, data, [term], training, 1e-4, Rng(0))

    def alone(objective: Objective) -> None:
        for _ in range(STEPS):
            z = logits.clone().requires_grad_()
            values = objective(z, probs[few], TEMPERATURE, data.y[few])
            torch.autograd.grad(values.mean(), z)

    kept: dict[str, object] = {"passes": PASSES, "batch": BATCH, "classes": CLASSES}
    for name, work in (("step", step), ("alone", alone)):
        kept[name], microseconds = ratios(work)
        kept[f"{name}_kl_microseconds"] = round(microseconds, 1)
    text = json.dumps(kept, indent=1)
    (Path(__file__).parent / "cost.json").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
