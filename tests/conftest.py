"""The tiny federation that the tests of the learning core run: four clients on 160 digits."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import settings

from fedkd.config import Experiment, experiment, override
from fedkd.engine.checkpoint import to_bytes
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import make_strategy, prepare
from fedkd.engine.simulate import in_process
from fedkd.engine.simulation import Run

settings.register_profile("fedkd", deadline=None, derandomize=True, database=None)
settings.load_profile("fedkd")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Experiment]:
    """Return ``tiny(strategy, {"key.sub": value})``, which makes an experiment.

    Strategies that need a public pool get one of 40 examples, unless ``changes`` say otherwise.
    """

    def make(strategy: Any = "fedavg", changes: dict[str, Any] | None = None) -> Experiment:
        table: dict[str, Any] = {
            "rounds": 3,
            "strategy": strategy,
            "model": {"name": "mlp", "hidden": [16, 12]},
            "data": {
                "source": {"name": "digits", "limit": 160, "test_limit": 60},
                "partition": {"name": "dirichlet", "alpha": 0.5},
            },
            "clients": {"count": 4, "training": {"lr": 0.2, "batch_size": 16}},
            "engine": {"executor": "serial", "device": "cpu", "checkpoint_every": 100},
        }
        for key, value in (changes or {}).items():
            override(table, key, value)
        made = experiment(table)
        asked = any(key.startswith("data.public") for key in changes or {})
        if not asked and make_strategy(made.strategy).needs_public():
            override(table, "data.public.size", 40)
        return experiment(table)

    return make


@pytest.fixture(scope="session")
def play(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return ``play(experiment, rounds=all, run=new)``, which plays rounds and returns the run."""
    numbers = count()

    def begin(experiment: Experiment, rounds: int | None = None, run: Run | None = None) -> Run:
        if run is None:
            path = tmp_path_factory.mktemp("run") / str(next(numbers))
            run = Run(prepare(experiment), RunFolder(path))
        with in_process():
            done = run.restore()
            for round_ in range(done + 1, (experiment.rounds if rounds is None else rounds) + 1):
                run.play(round_)
        return run

    return begin


@pytest.fixture(scope="session")
def bits() -> Callable[[Run], dict[str, bytes]]:
    """Return ``bits(run)``: the bytes of the server's and of every client's state."""

    def collect(run: Run) -> dict[str, bytes]:
        clients = range(run.prepared.federation.clients)
        states = {f"client {k}": to_bytes(run.client_state(k)) for k in clients}
        return {"server": to_bytes(run.state), **states}

    return collect


@pytest.fixture(scope="session")
def values() -> Callable[[Run], list[Any]]:
    """Return ``values(run)``: its records in order, seconds left out."""
    return lambda run: [r for r in run.log.records if r.metric != "seconds"]
