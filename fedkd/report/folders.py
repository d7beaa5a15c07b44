"""What a folder of results holds, whatever made it: a sweep, a comparison or a single run."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedkd.axes import STRATEGY, Table
from fedkd.config import Component, Experiment
from fedkd.engine.folder import RunFolder, read_records
from fedkd.errors import ConfigError
from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.report import runs as single
from fedkd.sweep.failed import reason_of
from fedkd.sweep.lock import held
from fedkd.sweep.plan import CONFIG, INDEX, read_index
from fedkd.sweep.tuning import read_tuning

State = Literal["finished", "failed", "running", "waiting"]


@dataclass(frozen=True, eq=False)
class Entry:
    """One run that a folder should hold, and what became of it.

    ``summary`` is there if it is finished, or if it has begun and what is there was asked for.
    """

    label: str
    point: Table
    seed: int
    folder: Path
    state: State
    summary: dict[str, Any] | None = None
    reason: str = ""
    rounds_done: int = 0
    digest: str = ""

    @cached_property
    def experiment(self) -> Experiment:
        """The run's own resolved configuration."""
        return single.stored(self.folder)


@dataclass(frozen=True, eq=False)
class Found:
    """The runs of one folder; ``meanings`` says what each label stands for, as text."""

    name: str
    folder: Path
    experiment: Experiment
    axes: tuple[str, ...]
    entries: list[Entry]
    meanings: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, Any] | None = None


def read_folder(folder: Path, workspace: Path | None, partial: bool) -> Found:
    """Read what a folder holds; with ``partial``, unfinished runs have a summary of what there is.

    Raises:
        ConfigError: it holds no run, or its files are damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}; name one that fedkd run or sweep has made")
    if (folder / INDEX).is_file():
        return _sweep(folder, partial)
    study = single.load(folder, workspace)
    entries = [_entry(cell.label, {}, cell.seed, cell.folder, partial, "") for cell in study.cells]
    meanings = _meanings(study.experiment, study.labels())
    return Found(study.experiment.name, folder, study.experiment, (), entries, meanings)


def _sweep(folder: Path, partial: bool) -> Found:
    index = read_index(folder)
    base = single.read_toml(folder / CONFIG)
    entries = [
        _entry(
            str(run["label"]),
            dict(run["point"]),
            int(run["seed"]),
            folder / run["folder"],
            partial,
            str(run["digest"]),
        )
        for run in index["runs"]
    ]
    meanings = _meanings(base, [str(label) for label in index["labels"]])
    axes, tuning = tuple(index["axes"]), read_tuning(folder)
    return Found(str(index["name"]), folder, base, axes, entries, meanings, tuning)


def _meanings(base: Experiment, labels: list[str]) -> dict[str, str]:
    """Return what each label changes, as text, so that equal labels can be told apart."""
    changes = dict(base.compare)
    for value in base.sweep.axes().get(STRATEGY, ()):
        changes.setdefault(Component(str(value)).name, {STRATEGY: value})
    changes.setdefault(base.strategy.name, {STRATEGY: base.strategy.table()})
    return {
        label: json.dumps(changes.get(label, label), sort_keys=True, default=str)
        for label in labels
    }


def _entry(label: str, point: Table, seed: int, folder: Path, partial: bool, digest: str) -> Entry:
    run = RunFolder(folder)
    summary = run.summary()
    if summary is not None:
        done = int(summary["rounds"])
        return Entry(label, point, seed, folder, "finished", summary, "", done, digest)
    reason = reason_of(folder)
    if not run.exists():
        state: State = "failed" if reason else "waiting"
        return Entry(label, point, seed, folder, state, None, reason or "not begun", 0, digest)
    state = "failed" if reason else "running" if held(folder) else "waiting"
    if not partial:
        reason = reason or "not finished"
        return Entry(label, point, seed, folder, state, None, reason, 0, digest)
    experiment = run.experiment()
    records = read_records(run.metrics) if run.metrics.is_file() else []
    log = Log(experiment.clients.count, records)
    done = max((r.round for r in records if r.metric == "seconds"), default=0)
    reason = reason or f"round {done} of {experiment.rounds}"
    made = _so_far(experiment, log) if log.rounds() else None
    return Entry(label, point, seed, folder, state, made, reason, done, digest)


def _so_far(experiment: Experiment, log: Log) -> dict[str, Any] | None:
    """Return a summary of an unfinished run, in the form of a finished one's."""
    predict = str(experiment.strategy.options.get("predict", "personal"))
    made = summarise(log, experiment.evaluate.last_k)
    if predict not in made["readouts"].get("composite", {}):
        return None
    return {
        "name": experiment.name,
        "strategy": experiment.strategy.name,
        "seed": experiment.seed,
        "rounds": experiment.rounds,
        "digest": experiment.digest(),
        "headline": {"readout": "composite", "predict": predict},
        **made,
        "privacy": "",
        "provenance": {},
    }
