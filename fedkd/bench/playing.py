"""Runs of our engine that operations are done in, each in a folder that goes with them."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fedkd.config import experiment
from fedkd.data.registries import sources
from fedkd.engine.folder import RunFolder
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import Run
from fedkd.errors import DataError
from fedkd.options import build

NEVER = 10**6


def begun(open_: ExitStack, table: dict[str, Any]) -> Run:
    """Return a run before its first round; judging and checkpoints are off unless asked for.

    To be called, and its rounds to be played, within ``in_process()``.

    Raises:
        DataError: its data are not here.
    """
    source = table["data"]["source"]
    missing = build(sources.get(source["name"]), {}, "source").missing()
    if missing:
        name = source["name"]
        raise DataError(f"data source {name!r} is not here: {missing}; or --source digits")
    folder = open_.enter_context(tempfile.TemporaryDirectory(prefix="fedkd-bench-"))
    base = {
        "name": "bench",
        "rounds": NEVER,
        "model": "cnn",
        "evaluate": {"every": NEVER},
        "engine": {"device": "cpu", "checkpoint_every": NEVER},
    }
    run = Run(prepare(experiment({**base, **table})), RunFolder(Path(folder) / "run"))
    open_.callback(run.close)
    run.begin()
    return run


def federation(source: str, clients: int, examples: int, alpha: float = 0.3) -> dict[str, Any]:
    """Return the table of data that are divided over clients, of at most so many examples."""
    return {
        "source": {"name": source, "limit": examples},
        "partition": {"name": "dirichlet", "alpha": alpha},
        "validation": 0.0,
    }


def images(source: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first training examples of a source, row-major, with their labels.

    Raises:
        DataError: its data are not here.
    """
    made = build(sources.get(source), {"limit": count}, "source")
    missing = made.missing()
    if missing:
        raise DataError(f"data source {source!r} is not here: {missing}; or --source digits")
    data = made.load()
    return torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
