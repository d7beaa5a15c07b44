"""Our engine as it is, with everything that a run does; judging and checkpoints are off."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import numpy as np

from fedkd.bench.backends.base import Backend
from fedkd.bench.registries import backends
from fedkd.bench.work import Work
from fedkd.errors import ConfigError, RunError


class Ours(Backend):
    """A run of fedkd by one executor."""

    workers = 0
    executor: ClassVar[str]
    counts_workers: ClassVar[bool] = True
    evaluate: ClassVar[dict[str, float]] = {}

    def available(self) -> str:
        from fedkd.engine.registries import executors

        known = self.executor == "auto" or self.executor in executors.names()
        return "" if known else f"this fedkd has no executor {self.executor!r}"

    def start(self, work: Work, dtype: str, threads: int, workers: int) -> None:
        from fedkd.bench.casting import in_dtype
        from fedkd.bench.making import setting
        from fedkd.engine.folder import RunFolder
        from fedkd.engine.setup import prepare
        from fedkd.engine.simulate import in_process
        from fedkd.engine.simulation import Run

        if threads != 1:
            raise ConfigError(
                f"fedkd's executors give each operation one torch thread, not {threads}; "
                f"ask for workers, as in {self.executor}:1x2"
            )
        self.work, self.trained, self.open = work, 0, ExitStack()
        folder = Path(self.open.enter_context(tempfile.TemporaryDirectory(prefix="fedkd-bench-")))
        engine = {"executor": self.executor, "workers": workers if self.counts_workers else 0}
        made = setting(work.plan, work.folder, engine=engine, evaluate=self.evaluate)
        self.prepared = in_dtype(prepare(made), dtype)
        self.open.enter_context(in_process())
        self.run = Run(self.prepared, RunFolder(folder / "run"))
        self.open.callback(self.run.close)
        self.run.begin()
        for name, weight in work.initial.items():
            self.run.state[f"model/{name}"] = weight.astype(dtype)

    def round(self, round_: int) -> None:
        failures = self.run.play(round_)
        if failures:
            raise RunError(f"round {round_}: {failures[0]}")
        clients = self.prepared.setting.clients
        self.trained = sum(clients[k].examples for k in self.prepared.attendance.cohort(round_))

    def weights(self) -> dict[str, np.ndarray]:
        return {name: np.array(self.run.state[f"model/{name}"]) for name in self.work.initial}

    def samples(self) -> int:
        return self.trained

    def hash(self, work: Work) -> str:
        """Return the hash of what our engine loaded and drew by itself."""
        from fedkd.bench.making import extract

        return extract(self.prepared, work.plan).hash

    def close(self) -> None:
        self.open.close()


@backends.register("serial")
class Serial(Ours):
    """Our engine, one client after the other."""

    executor, workers, counts_workers = "serial", 1, False


@backends.register("thread")
class Thread(Ours):
    """Our engine, clients in threads."""

    executor = "thread"


@backends.register("process")
class Process(Ours):
    """Our engine, clients in worker processes."""

    executor = "process"


@backends.register("cohort")
class Cohort(Ours):
    """Our engine, the cohort's networks as one stack."""

    executor = "cohort"


@backends.register("auto")
class Auto(Ours):
    """Our engine with the executor that it chooses by itself: what a user gets."""

    executor = "auto"


@backends.register("judged")
class Judged(Auto):
    """As auto, and every client is judged after every single round."""

    evaluate: ClassVar[dict[str, float]] = {"every": 1, "share": 1.0}
