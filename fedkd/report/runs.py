"""The finished runs of a comparison as the report sees them: summaries, records, configurations.

Everything is read from the run folders, so a report can be made again at any time from disk.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fedkd.config import Experiment, experiment
from fedkd.engine.folder import RunFolder, read_records
from fedkd.engine.study import CellResult, StudyResult, folders
from fedkd.errors import ConfigError
from fedkd.metrics.log import Log
from fedkd.report.curves import Curves, curves
from fedkd.types import Record

STUDY, RUN = "study.toml", "config.toml"
AGAIN = "remove the folder and run it again"
"""What helps where the records of a finished run are damaged."""


@dataclass(frozen=True)
class RunView:
    """One finished run, read from its folder when something is asked for."""

    label: str
    seed: int
    folder: Path
    summary: dict[str, Any]

    @property
    def headline(self) -> tuple[str, str]:
        """The read-out and the predictor that the method is compared by."""
        return self.summary["headline"]["readout"], self.summary["headline"]["predict"]

    @cached_property
    def experiment(self) -> Experiment:
        """The run's resolved configuration."""
        return stored(self.folder)

    @cached_property
    def log(self) -> Log:
        """All records of the run."""
        return Log(self.experiment.clients.count, records(self.folder / "metrics.jsonl"))

    @cached_property
    def curves(self) -> Curves:
        """The run by round, without its log."""
        file = self.folder / "metrics.jsonl"
        held = records(file)
        if not held:
            raise ConfigError(f"{file} is empty, though the run has a summary; {AGAIN}")
        try:
            return curves(held, self.experiment.clients.count, *self.headline)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{file} is damaged ({error!r}); {AGAIN}") from None

    @cached_property
    def ledger(self) -> dict[str, Any] | None:
        """What was claimed and spent (``privacy.json``); None where no mechanism was used."""
        file = self.folder / "privacy.json"
        if not file.is_file():
            return None
        try:
            found: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{file} is damaged ({error}); {AGAIN}") from None
        return found

    @cached_property
    def data(self) -> str:
        """What decides which client has which examples, apart from the seed."""
        config = self.experiment
        return json.dumps([config.table()["data"], config.clients.count], sort_keys=True)

    def judged(self) -> tuple[list[int], np.ndarray]:
        """Return the judged rounds and the headline accuracies (rounds, clients)."""
        readout, predict = self.headline
        table = self.log.table("accuracy", "test", readout, predict)
        rounds = self.log.rounds("accuracy", "own" if readout == "stale" else readout)
        held = [i for i in range(len(table)) if not np.isnan(table[i]).all()]
        return [rounds[i] for i in held], table[held]

    def by_client(self, which: str) -> np.ndarray:
        """Return each client's headline accuracy (K,): ``mean_last_k``, ``last`` or as chosen."""
        rounds, table = self.judged()
        if which == "mean_last_k":
            rows = table[-self.experiment.evaluate.last_k :]
        elif which == "last":
            rows = table[-1:]
        else:
            rows = table[[rounds.index(self.entry(which)["round"])]]
        seen = ~np.isnan(rows)
        return np.where(seen, rows, 0).sum(0) / np.where(seen.any(0), seen.sum(0), np.nan)

    def entry(self, which: str) -> dict[str, Any]:
        """Return the headline's entry of the summary, empty where there is none."""
        readout, predict = self.headline
        found: dict[str, Any] = self.summary["readouts"].get(readout, {}).get(predict, {})
        return dict(found.get(which, {}))


def records(file: Path) -> list[Record]:
    """Return the records of a run.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        return read_records(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); {AGAIN}") from None


def views(study: StudyResult) -> dict[str, list[RunView]]:
    """Return the finished runs by label; a label without any has an empty list."""
    found: dict[str, list[RunView]] = {label: [] for label in study.labels()}
    for cell in study.cells:
        if cell.summary is not None:
            view = RunView(cell.label, cell.seed, cell.folder, cell.summary)
            found[cell.label].append(view)
    return found


def stored(folder: Path) -> Experiment:
    """Return the experiment that a folder holds: a comparison, or a single run.

    Raises:
        ConfigError: the folder holds neither.
    """
    for name in (STUDY, RUN):
        if (folder / name).is_file():
            return read_toml(folder / name)
    raise ConfigError(f"{folder} holds no run: there is neither {STUDY} nor {RUN} in it")


def read_toml(file: Path) -> Experiment:
    """Return the experiment that a file of results holds.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from None
    try:
        return experiment(table)
    except ConfigError as error:
        raise type(error)(f"{file}: {error}") from None


def load(folder: str | Path, workspace: Path | None = None) -> StudyResult:
    """Read a comparison, or a single run, from disk; nothing is run.

    Raises:
        ConfigError: the folder holds none.
    """
    place = Path(folder)
    config = stored(place)
    cells = list(config.cells(workspace))
    study = StudyResult(config, place)
    for cell, path in zip(cells, folders(cells, place), strict=True):
        summary = RunFolder(path).summary()
        error = "" if summary else f"not finished; fedkd run --resume --out {place}"
        study.cells.append(CellResult(cell.label, cell.seed, path, summary, error))
    return study
