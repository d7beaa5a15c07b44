"""What papers claim of single objectives, tried with paired seeds on Fashion-MNIST.

    python -m experiments.objectives.effects             # everything that is missing
    python -m experiments.objectives.effects bd-kd ssld  # some of it

One teacher and one student for most; ``dho`` and ``bd-kd, online`` are federations. Results are
written after every seed to ``effects.json``; a finished seed is not run again. ``effects.md`` has
the differences.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from experiments.harness import Job, place, run_job, values
from experiments.objectives.study import BASE
from fedkd.clients.guided import distil, guide
from fedkd.clients.heads import infer
from fedkd.clients.local import Occasion, Term, fit
from fedkd.clients.terms import Supervised
from fedkd.clients.training import Training
from fedkd.data.dataset import Dataset
from fedkd.data.federated import UNLABELLED, Split
from fedkd.data.registries import sources
from fedkd.distill.chosen import chosen
from fedkd.distill.targets import SampleTargets
from fedkd.metrics.agreement import mean_kl
from fedkd.metrics.calibration import expected_calibration_error, negative_log_likelihood
from fedkd.metrics.intervals import mean_t, paired_t
from fedkd.models.base import BlockNet
from fedkd.models.book import ModelBook
from fedkd.rng import Rng

HERE = Path(__file__).parent
SEEDS = tuple(range(10))
LRS = (0.005, 0.02, 0.05)
"""Tried for every variant alike; one is chosen by 1,000 validation examples."""
Scores = dict[str, dict[str, float]]
"""What came out for each variant."""


@lru_cache(maxsize=1)
def data() -> Dataset:
    """Return Fashion-MNIST, 20,000 images to draw from and 4,000 of the test set."""
    return sources.get("fashion-mnist")().read().limited(20_000, 4_000)


def drawn(seed: int, *sizes: int) -> list[Split]:
    """Return disjoint sets of training images of these sizes, and the test set last."""
    order = Rng(seed, ("effects",)).numpy().permutation(len(data().train_y))
    parts = np.split(order, np.cumsum(sizes))[: len(sizes)]
    found = [Split(torch.from_numpy(data().train_x[p]), whole(data().train_y[p])) for p in parts]
    return [*found, Split(torch.from_numpy(data().test_x), whole(data().test_y))]


def whole(y: np.ndarray) -> Tensor:
    """Return labels as a tensor."""
    return torch.from_numpy(y.astype(np.int64))


def network(seed: int, hidden: Sequence[int]) -> BlockNet:
    """Return a perceptron with initial weights of this seed."""
    return ModelBook(data().task(), {"m": ("mlp", {"hidden": list(hidden)})}, seed).make("m")


def train(
    net: BlockNet, on: Split, terms: Sequence[Term], steps: int, lr: float, seed: int
) -> None:
    """Train in place by sgd with momentum on batches of 64."""
    rng = Rng(seed, ("train",))
    ready = [more for t in terms for more in t.placed(Occasion(net, on, lr, rng))]
    fit(net, on, ready, Training(steps=steps, batch_size=64, momentum=0.9), lr, rng)


def said(net: BlockNet, x: Tensor, temperature: float = 1.0) -> Tensor:
    """Return probabilities (n, C)."""
    return functional.softmax(infer(net, x, ())[0] / temperature, dim=1).clone()


def teacher(seed: int, on: Split, hidden: Sequence[int] = (256, 128)) -> BlockNet:
    """Return a network that was trained on labels."""
    net = network(1000 + seed, hidden)
    train(net, on, [Supervised()], 1000, 0.05, seed)
    return net


def judged(net: BlockNet, test: Split, taught: Tensor | None = None) -> dict[str, float]:
    """Return accuracy, ECE and negative log-likelihood; the divergence from a teacher's answers."""
    p = said(net, test.x).double().numpy()
    p /= p.sum(1, keepdims=True)
    y = test.y.numpy()
    found = {
        "accuracy": float((p.argmax(1) == y).mean()),
        "ece": expected_calibration_error(p, y),
        "nll": negative_log_likelihood(p, y),
    }
    if taught is not None:
        t = taught.double().numpy()
        found["kl"] = mean_kl(t / t.sum(1, keepdims=True), p)
    return found


def best(tried: Callable[[float], BlockNet], held: Split, by: str = "accuracy") -> BlockNet:
    """Return what was learned at the best of the learning rates, by what validation says."""
    made = [tried(lr) for lr in LRS]
    scores = [judged(net, held)[by] for net in made]
    sign = 1 if by == "accuracy" else -1
    return made[max(range(len(LRS)), key=lambda i: sign * scores[i])]


def student(
    seed: int,
    on: Split,
    probs: Tensor,
    objective: str | dict[str, Any],
    lr: float,
    *,
    share: float = 0.5,
    temperature: float = 4.0,
    hidden: Sequence[int] = (32,),
    steps: int = 600,
    policies: Sequence[str] = (),
) -> BlockNet:
    """Return a student of soft targets, of which labels are given ``1 - share``."""
    net = network(seed, hidden)
    by = guide(list(policies), 1, 1, steps)
    terms: list[Term] = [
        distil(chosen(objective), SampleTargets(probs), temperature, share, guide=by)
    ]
    if share < 1:
        terms.append(Supervised(1 - share))
    train(net, on, terms, steps, lr, seed)
    return net


def labelled(seed: int, on: Split, lr: float, hidden: Sequence[int] = (32,)) -> BlockNet:
    """Return a network that learned from labels alone."""
    net = network(seed, hidden)
    train(net, on, [Supervised()], 600, lr, seed)
    return net


def bd_kd(seed: int) -> Scores:
    """ECE of balanced divergences, by both rules, beside that of distillation and of labels."""
    big, small, held, test = drawn(seed, 3000, 1000, 1000)
    soft = said(teacher(seed, big), small.x, 4.0)
    names: dict[str, str | dict[str, Any]] = {
        "kd": "kl",
        "bd-kd": "bd-kd",
        "bd-kd, swapped": {"name": "bd-kd", "rule": "swapped"},
        "reverse-kl": "reverse-kl",
    }
    found = {
        label: judged(best(partial(student, seed, small, soft, named), held), test)
        for label, named in names.items()
    }
    return {**found, "labels only": judged(best(partial(labelled, seed, small), held), test)}


def pld(seed: int) -> Scores:
    """PLD as it is, with no weight to tune, beside distillation whose weight and T are tuned."""
    big, small, held, test = drawn(seed, 3000, 1000, 1000)
    net = teacher(seed, big)
    soft = said(net, small.x)
    alone = partial(student, seed, small, soft, "pld", share=1.0, temperature=1.0)
    found = {"pld": judged(best(alone, held), test)}
    score, kept = -1.0, None
    for share, temperature in itertools.product((0.1, 0.5, 0.9), (1.0, 4.0)):
        soft = said(net, small.x, temperature)
        own = partial(student, seed, small, soft, "kl", share=share, temperature=temperature)
        tried = best(own, held)
        if (now := judged(tried, held)["accuracy"]) > score:
            score, kept = now, tried
        if (share, temperature) == (0.5, 4.0):
            found["kd, default"] = judged(tried, test)
    assert kept is not None
    return {"kd, tuned": judged(kept, test), **found}


def sinkd(seed: int) -> Scores:
    """A student that is sure of other classes than its teacher: KL alone, and with Sinkhorn's."""
    big, small, held, test = drawn(seed, 3000, 1000, 1000)
    soft = said(teacher(seed, big), small.x, 2.0)
    wrong = Split(small.x, (small.y + 5) % 10)
    pool = Split(small.x, torch.full_like(small.y, UNLABELLED))

    def taught(objective: str, steps: int, lr: float) -> BlockNet:
        net = labelled(seed, wrong, 0.05)
        term = distil(chosen(objective), SampleTargets(soft), 2.0, 1.0)
        train(net, pool, [term], steps, lr, seed)
        return net

    return {
        f"{name}, {steps} steps": judged(best(partial(taught, name, steps), held, "nll"), test)
        for name, steps in itertools.product(("kl", "sinkd"), (30, 300))
    }


def taid(seed: int) -> Scores:
    """A teacher far larger than its student, a bottleneck of four units; no labels, T = 1."""
    big, small, held, test = drawn(seed, 3000, 3000, 1000)
    net = teacher(seed, big, (512, 256))
    soft, truth = said(net, small.x), said(net, test.x)
    variants = {"taid": ("soft-ce", ["taid"]), "kl": ("kl", []), "reverse-kl": ("reverse-kl", [])}
    found = {}
    for label, (named, policies) in variants.items():
        tried = partial(
            student,
            seed,
            small,
            soft,
            named,
            share=1.0,
            temperature=1.0,
            hidden=(4,),
            steps=1500,
            policies=policies,
        )
        found[label] = judged(best(tried, held, "nll"), test, truth)
    return found


def ssld(seed: int) -> Scores:
    """Fifty labels without a teacher; none with one, whose answers on 2,950 images are known."""
    big, few, many, held, test = drawn(seed, 3000, 50, 2950, 1000)
    net = teacher(seed, big)
    alone = best(partial(labelled, seed, few), held)
    soft = said(net, many.x)
    own = partial(student, seed, many, soft, "symmetric-kl", share=1.0, temperature=1.0)
    return {"50 labels": judged(alone, test), "label-free": judged(best(own, held), test)}


def federated(seed: int, study: str, variants: Mapping[str, dict[str, Any]]) -> Scores:
    """Return user accuracy and ECE of strategies in the federation of the matrix."""
    found = {}
    for label, strategy in variants.items():
        folder = place(Path("runs/objectives-effects"), study, label, seed)
        run_job(Job(label, BASE, {"strategy": strategy, "seed": seed}, folder))
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        predict = summary["headline"]["predict"]
        found[label] = {
            name: values({seed: summary}, predict, key, "composite", rule)[seed]
            for name, key, rule in (
                ("accuracy", "user_accuracy", "mean_last_k"),
                ("ece", "ece", "last"),
            )
        }
    return found


BASELINES: dict[str, dict[str, Any]] = {
    "local-only": {"name": "local-only"},
    "fedavg + fine-tuning": {"name": "fedavg-ft"},
}


def dho(seed: int) -> Scores:
    """A personal head for the labels beside one that is averaged, and both baselines, alpha 0.1."""
    variants: dict[str, dict[str, Any]] = {
        "dho, personal": {"name": "dho"},
        "dho, averaged": {"name": "dho", "supervised_head": "averaged"},
        "fedper": {"name": "fedper"},
    }
    return federated(seed, "dho", {**variants, **BASELINES})


def online(seed: int) -> Scores:
    """Balanced divergences where the teacher learns along: mutual learning of two networks."""
    variants = {f"fml, {o}": {"name": "fml", "objective": o} for o in ("kl", "bd-kd")}
    return federated(seed, "online", {**variants, **BASELINES})


STUDIES: dict[str, tuple[Callable[[int], Scores], list[tuple[str, str, str, str]]]] = {
    "bd-kd": (
        bd_kd,
        [
            ("bd-kd", "kd", "ece", "below 0"),
            ("bd-kd, swapped", "kd", "ece", "-"),
            ("bd-kd", "kd", "accuracy", "not below 0"),
        ],
    ),
    "bd-kd, online": (
        online,
        [
            ("fml, bd-kd", "fml, kl", "ece", "below 0"),
            ("fml, bd-kd", "fml, kl", "accuracy", "not below 0"),
            ("fml, bd-kd", "local-only", "accuracy", "-"),
            ("fml, bd-kd", "fedavg + fine-tuning", "accuracy", "-"),
        ],
    ),
    "pld": (pld, [("pld", "kd, tuned", "accuracy", "not below 0")]),
    "sinkd": (
        sinkd,
        [
            ("sinkd, 30 steps", "kl, 30 steps", "nll", "below 0"),
            ("sinkd, 300 steps", "kl, 300 steps", "nll", "below 0"),
            ("sinkd, 30 steps", "kl, 30 steps", "accuracy", "above 0"),
            ("sinkd, 300 steps", "kl, 300 steps", "accuracy", "above 0"),
        ],
    ),
    "taid": (
        taid,
        [
            ("taid", "kl", "kl", "below 0"),
            ("taid", "reverse-kl", "kl", "below 0"),
            ("taid", "kl", "accuracy", "above 0"),
            ("taid", "reverse-kl", "accuracy", "above 0"),
        ],
    ),
    "dho": (
        dho,
        [
            ("dho, personal", "dho, averaged", "accuracy", "above 0"),
            ("dho, personal", "fedper", "accuracy", "-"),
            ("dho, personal", "local-only", "accuracy", "-"),
            ("dho, personal", "fedavg + fine-tuning", "accuracy", "-"),
        ],
    ),
    "ssld": (ssld, [("label-free", "50 labels", "accuracy", "above 0")]),
}
"""What is run for each claim, and which differences it is about, with what papers expect."""
SHOWN = {
    "accuracy": (100, "accuracy, %"),
    "ece": (100, "ECE, %"),
    "nll": (1, "NLL"),
    "kl": (1, "KL to teacher"),
}


def write(found: dict[str, dict[str, Scores]]) -> None:
    """Write ``effects.md`` from what has finished."""
    text = [
        "# Claims, with paired seeds\n",
        "Made by `python -m experiments.objectives.effects` on Fashion-MNIST; each seed draws "
        "other images, initial weights and batches. The learning rate of every variant is the best "
        f"of {len(LRS)} on 1,000 validation examples (fixed in federations). Means over seeds, and "
        "the difference paired by seed, with 95 % t intervals.\n",
        "| study | what | first | second | difference | expected | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (_, pairs) in STUDIES.items():
        by_seed = found.get(name, {})
        for one, other, key, expected in pairs:
            there = [s for s in by_seed.values() if one in s and other in s]
            both = [(s[one][key], s[other][key]) for s in there]
            if len(both) < 2:
                continue
            scale, unit = SHOWN[key]
            a, b = ([scale * pair[i] for pair in both] for i in (0, 1))
            gap, digits = paired_t(a, b), 1 if scale == 100 else 3
            half = (gap.high - gap.low) / 2
            text.append(
                f"| {name} | {unit} | {one}: {mean_t(a).value:.{digits}f} | "
                f"{other}: {mean_t(b).value:.{digits}f} | "
                f"{gap.value:+.{digits}f} ± {half:.{digits}f} | {expected} | {len(both)} |"
            )
    (HERE / "effects.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("studies", nargs="*", default=list(STUDIES))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    file = HERE / "effects.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in given.studies:
        for seed in SEEDS[: given.seeds]:
            done = found.setdefault(name, {})
            if str(seed) in done:
                continue
            done[str(seed)] = STUDIES[name][0](seed)
            print(name, seed, done[str(seed)], flush=True)
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    write(found)


if __name__ == "__main__":
    main()
