"""Seconds a round of FedAvg beside a hand-written loop, as ratios from alternating passes.

    python benchmarks/round.py --passes 5 --rounds 2 --out round.json

The work is one and the same for every backend: Fashion-MNIST, 100 clients, Dirichlet 0.3, 10 a
round, the small CNN, one local epoch, batch 32, SGD. Every backend trains the same cohorts on the
same batches; before timing, their weights after one round are compared. ``bare`` is what a
researcher would write by hand over preloaded tensors, with 1 and 2 torch threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROCESS_START = time.perf_counter()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from fedkd.config import experiment  # noqa: E402
from fedkd.engine.folder import RunFolder  # noqa: E402
from fedkd.engine.setup import Prepared, prepare  # noqa: E402
from fedkd.engine.simulate import in_process  # noqa: E402
from fedkd.engine.simulation import Run  # noqa: E402
from fedkd.rng import stream  # noqa: E402

BACKENDS = ("bare-1", "bare-2", "bare-channels-last-1", "serial", "thread")
NEVER = 10**6


def setting(executor: str) -> Prepared:
    """Return the parts of the one workload."""
    return prepare(
        experiment(
            {
                "name": "bench",
                "rounds": NEVER,
                "strategy": "fedavg",
                "model": "cnn",
                "data": {
                    "source": "fashion-mnist",
                    "partition": {"name": "dirichlet", "alpha": 0.3},
                    "validation": 0.0,
                },
                "clients": {
                    "count": 100,
                    "participation": {"ratio": 0.1},
                    "training": {"lr": 0.05},
                },
                "evaluate": {"every": NEVER},
                "engine": {"executor": executor, "checkpoint_every": NEVER},
            }
        )
    )


class Ours:
    """Our engine, with everything a run does but judging and checkpoints (both are off)."""

    def __init__(self, executor: str, folder: Path) -> None:
        self.run = Run(setting(executor), RunFolder(folder / executor))
        self.run.begin()

    def round(self, round_: int) -> None:
        """Play one round."""
        self.run.play(round_)

    def weights(self) -> dict[str, np.ndarray]:
        """Return the global model."""
        return {k[6:]: v for k, v in self.run.state.items() if k.startswith("model/")}


class Bare:
    """A loop over preloaded tensors, as one would write it for one experiment."""

    def __init__(self, threads: int, channels_last: bool = False) -> None:
        prepared = setting("serial")
        self.threads, self.prepared = threads, prepared
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.data = {}
        for k in range(100):
            train = prepared.federation.client(k).train
            self.data[k] = (train.x.to(memory_format=self.format), train.y)
        self.net = prepared.setting.book.make("cnn").to(memory_format=self.format)
        self.state = {k: v.detach().clone() for k, v in self.net.named_parameters()}

    def round(self, round_: int) -> None:
        """Train the round's cohort one after the other and average."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        cohort = self.prepared.experiment.clients.participation.cohort(0, round_, range(100))
        total = sum(len(self.data[k][1]) for k in cohort)
        new = {k: torch.zeros_like(v) for k, v in self.state.items()}
        for k in cohort:
            x, y = self.data[k]
            with torch.no_grad():
                for name, p in self.net.named_parameters():
                    p.copy_(self.state[name])
            optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)
            rng = stream(0, "local", round_, k).child("epoch", 0)
            order = torch.randperm(len(y), generator=rng.torch())
            x, y = x[order].contiguous(memory_format=self.format), y[order]
            for i in range(0, len(y), 32):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.net(x[i : i + 32]), y[i : i + 32])
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                for name, p in self.net.named_parameters():
                    new[name] += p * (len(y) / total)
        self.state = new
        torch.set_num_threads(before)

    def weights(self) -> dict[str, np.ndarray]:
        """Return the global model."""
        return {k: v.numpy() for k, v in self.state.items()}


def make(name: str, folder: Path) -> Ours | Bare:
    """Return a backend by name."""
    if name.startswith("bare"):
        return Bare(int(name[-1]), "channels-last" in name)
    return Ours(name, folder)


def timed(call: Callable[[], None]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(passes: int, rounds: int) -> dict[str, object]:
    """Time all backends in turn, pass by pass, and return medians and ratios."""
    with tempfile.TemporaryDirectory() as temporary, in_process():
        backends = {name: make(name, Path(temporary)) for name in BACKENDS}
        for backend in backends.values():
            backend.round(1)
        reference = backends["bare-1"].weights()
        apart = {
            name: max(float(np.abs(w - reference[k]).max()) for k, w in b.weights().items())
            for name, b in backends.items()
        }
        for name, difference in apart.items():
            if difference > 2e-3:
                raise SystemExit(f"{name} does not do the same work: weights differ {difference}")
        seconds: dict[str, list[float]] = {name: [] for name in BACKENDS}
        for i in range(passes):
            for name, backend in backends.items():
                first = 2 + i * rounds
                taken = timed(lambda b=backend, f=first: [b.round(f + r) for r in range(rounds)])
                seconds[name].append(taken / rounds)
            print(f"pass {i + 1}/{passes}", {n: round(s[-1], 2) for n, s in seconds.items()})
    return {
        "passes": passes,
        "rounds_a_pass": rounds,
        "weights_apart_after_round_1": apart,
        "seconds_a_round": {
            n: {"median": statistics.median(s), "all": s} for n, s in seconds.items()
        },
        "ratios": {
            f"{a} / {b}": ratio(seconds[a], seconds[b])
            for a, b in (
                ("serial", "bare-1"),
                ("serial", "bare-channels-last-1"),
                ("thread", "bare-2"),
                ("thread", "serial"),
            )
        },
    }


def ratio(a: list[float], b: list[float]) -> dict[str, object]:
    """Return the median of the ratios pass by pass, with their range."""
    each = [x / y for x, y in zip(a, b, strict=True)]
    return {"median": statistics.median(each), "low": min(each), "high": max(each), "n": len(each)}


def alone(name: str) -> None:
    """Print start-up seconds and peak memory of one backend, in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary, in_process():
        backend = make(name, Path(temporary))
        start_up = time.perf_counter() - PROCESS_START
        backend.round(1)
        # Not ru_maxrss: a child of a large process starts with its parent's.
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmHWM")) / 1024
    print(json.dumps({"start_up_seconds": round(start_up, 2), "peak_mib": round(peak)}))


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--alone", choices=BACKENDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.alone:
        alone(given.alone)
        return
    result = compare(given.passes, given.rounds)
    result["alone"] = {
        name: json.loads(
            subprocess.run(
                [sys.executable, __file__, "--alone", name],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for name in BACKENDS
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
