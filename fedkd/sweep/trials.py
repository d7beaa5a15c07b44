"""What trials are worth: judged on validation data, and kept, with those that failed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedkd.axes import Table, Tune
from fedkd.config import Experiment
from fedkd.engine.folder import RunFolder, read_records
from fedkd.errors import ConfigError, RunError
from fedkd.metrics.log import Log
from fedkd.sweep.plan import PlannedRun
from fedkd.sweep.tune_rules import space_of

VERSION = 1


@dataclass(frozen=True)
class Trial:
    """One trial: its options, the validation accuracy in [0, 1] (None: it failed), its run."""

    options: Table
    validation: float | None
    digest: str
    error: str = ""


@dataclass
class Tuned:
    """The trials of a label; ``method`` is how they were found."""

    method: str
    trials: list[Trial] = field(default_factory=list)

    @property
    def best(self) -> Trial | None:
        """The trial with the best validation accuracy, the first of equal ones."""
        finished = [trial for trial in self.trials if trial.validation is not None]
        return max(finished, key=lambda trial: trial.validation or 0.0, default=None)

    def table(self) -> Table:
        """Return what ``tuning.json`` holds of a label."""
        best = self.best
        return {
            "method": self.method,
            "chosen": {} if best is None else best.options,
            "validation": None if best is None else best.validation,
            "trials": [
                {"options": t.options, "validation": t.validation, "digest": t.digest}
                | {"error": t.error}
                for t in self.trials
            ],
        }


@dataclass
class Tuning:
    """What was searched, and what came out for each label."""

    tune: Tune
    labels: dict[str, Tuned]

    def table(self) -> Table:
        """Return what ``tuning.json`` holds; no times and no paths, so repeats are equal."""
        return {
            "version": VERSION,
            "method": self.tune.method,
            "seed": self.tune.seed,
            "trials": self.tune.trials,
            "at": self.tune.at,
            "space": self.tune.space,
            "labels": {
                label: {"space": space_of(self.tune, label), **found.table()}
                for label, found in self.labels.items()
            },
        }


def validation(folder: Path, experiment: Experiment) -> float:
    """Return the mean over clients of a finished run's validation accuracy, in [0, 1].

    Of its headline read-out, mean of the last ``evaluate.last_k`` evaluations.

    Raises:
        RunError: the run is not finished, or nobody holds validation examples.
    """
    run = RunFolder(folder)
    summary = run.summary()
    if summary is None:
        raise RunError("it did not finish")
    log = Log(experiment.clients.count)
    log.add(read_records(run.metrics))
    headline = summary["headline"]
    table = log.table("accuracy", "validation", headline["readout"], headline["predict"])
    rows = [row for row in table if not np.isnan(row).all()]
    if not rows:
        raise RunError("no client holds an example for validation; raise data.validation")
    return float(np.mean([np.nanmean(row) for row in rows[-experiment.evaluate.last_k :]]))


def judged(run: PlannedRun, failed: str) -> tuple[float | None, str]:
    """Return the validation accuracy of a run, or None and why there is none."""
    if failed:
        return None, failed
    try:
        return validation(run.folder, run.experiment), ""
    except (RunError, ConfigError) as error:
        return None, str(error)
