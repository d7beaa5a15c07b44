"""What a folder of results holds, whatever made it: a sweep, a comparison or a single run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fedkd.axes import Sweep, Table
from fedkd.config import Experiment
from fedkd.engine.folder import RunFolder
from fedkd.engine.lock import held
from fedkd.engine.setup import resolve
from fedkd.errors import ConfigError
from fedkd.metrics.log import Log
from fedkd.metrics.summary import summarise
from fedkd.report import runs as single
from fedkd.sweep.failed import reason_of
from fedkd.sweep.plan import CONFIG, INDEX, labels_of, read_index
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
    base: Experiment | None = None

    @property
    def begun(self) -> bool:
        """Whether the run has a configuration of its own."""
        return RunFolder(self.folder).exists()

    @cached_property
    def experiment(self) -> Experiment:
        """The run's own resolved configuration; before it has begun, what it follows from."""
        if self.base is None or self.begun:
            return single.stored(self.folder)
        labels = labels_of(self.base)
        # Of three privacy curves, "LABEL, CURVE", the label's own.
        changes = labels.get(self.label) or labels.get(self.label.rpartition(", ")[0]) or {}
        alone = replace(self.base, compare={}, seeds=(), sweep=Sweep(), seed=self.seed)
        [cell] = alone.cells(None, {self.label: {**changes, **self.point}})
        return resolve(cell.experiment)


@dataclass(frozen=True, eq=False)
class Found:
    """The runs of one folder; ``axes`` are the keys that vary by plan."""

    name: str
    folder: Path
    experiment: Experiment
    axes: tuple[str, ...]
    entries: list[Entry]
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
    base = replace(study.experiment, sweep=Sweep())
    entries = [
        _entry(cell.label, {}, cell.seed, cell.folder, partial, base) for cell in study.cells
    ]
    return Found(study.experiment.name, folder, base, (), entries)


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
            base,
        )
        for run in index["runs"]
    ]
    # What an earlier command tuned in the same folder says nothing of these runs.
    tuning = read_tuning(folder) if base.sweep.tune.trials else None
    return Found(str(index["name"]), folder, base, tuple(index["axes"]), entries, tuning)


def _entry(
    label: str, point: Table, seed: int, folder: Path, partial: bool, base: Experiment
) -> Entry:
    run = RunFolder(folder)
    summary = run.summary()
    if summary is not None:
        done = int(summary.get("rounds", 0))
        return Entry(label, point, seed, folder, "finished", summary, "", done, base)
    reason = reason_of(folder)
    if not run.exists():
        state: State = "failed" if reason else "waiting"
        return Entry(label, point, seed, folder, state, None, reason or "not begun", 0, base)
    state = "failed" if reason else "running" if held(folder) else "waiting"
    records = single.records(run.metrics) if run.metrics.is_file() else []
    done = max((r.round for r in records if r.metric == "seconds"), default=0)
    if not partial:
        reason = reason or "not finished"
        return Entry(label, point, seed, folder, state, None, reason, done, base)
    experiment = run.experiment()
    log = Log(experiment.clients.count, records)
    reason = reason or f"round {done} of {experiment.rounds}"
    made = _so_far(experiment, log) if log.rounds() else None
    return Entry(label, point, seed, folder, state, made, reason, done, base)


def _so_far(experiment: Experiment, log: Log) -> dict[str, Any] | None:
    """Return a summary of an unfinished run, in the form of a finished one's."""
    predict = experiment.predict
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
