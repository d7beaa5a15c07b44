"""Run a sweep: check everything first, do what is missing, keep what is finished.

A run that fails is reported and the others go on. The same command again tries failed runs anew
and goes on with interrupted ones to the very bits of an undisturbed run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from fedkd.axes import Table
from fedkd.config import Cell, Experiment
from fedkd.engine.folder import RunFolder
from fedkd.engine.lock import locked
from fedkd.engine.setup import load_workspace, prepare
from fedkd.engine.study import check
from fedkd.errors import ConfigError
from fedkd.sweep import privacy_curves
from fedkd.sweep.plan import INDEX, PlannedRun, labels_of, plan, write_index
from fedkd.sweep.pool import run_all
from fedkd.sweep.trials import Trial
from fedkd.sweep.tune import apply, tune
from fedkd.sweep.tuning import read_tuning
from fedkd.sweep.worker import Told

OTHERS = ("study.toml", "config.toml")
"""Files of a folder that holds a comparison or a single run."""


class SweepWatcher(Protocol):
    """Is told of what happens in a sweep, for instance to draw its table.

    ``planned`` comes once for each batch of trials, and then for the sweep itself.
    """

    def checking(self, done: int, of: int) -> None:
        """Take note of how many labels and points have been checked, before anything is run."""

    def planned(self, runs: Sequence[PlannedRun], finished: Sequence[str]) -> None:
        """Take note of all runs, and of the digests of those that were finished before."""

    def trial_finished(self, label: str, trial: Trial, number: int, trials: int) -> None:
        """Take note of one of a label's trials."""

    def told(self, run: PlannedRun, told: Told) -> None:
        """Take note of a round, of a result or of a failure."""


@dataclass(frozen=True)
class SweepResult:
    """All runs of a sweep, and why those without a result have none, by digest."""

    experiment: Experiment
    folder: Path
    runs: list[PlannedRun] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[PlannedRun]:
        """The runs without a result, each once."""
        return list({r.digest: r for r in self.runs if r.digest in self.errors}.values())


def run_sweep(
    experiment: Experiment,
    out: str | Path,
    *,
    jobs: int = 1,
    watcher: SweepWatcher | None = None,
    workspace: Path | None = None,
) -> SweepResult:
    """Run every label at every point of ``experiment.sweep`` for every seed, each once.

    Args:
        experiment: with ``sweep``, ``compare`` and ``seeds``.
        out: folder of the sweep; what is finished in it is kept.
        jobs: runs at a time, each in a process of its own with an equal share of the cores.
        watcher: told of every round.
        workspace: where presets and drop-ins are looked for.

    Raises:
        ConfigError: some run is impossible: found before the first one starts.
            Also if ``out`` holds a single run or a comparison.
        RunError: another process is at work in ``out``.
    """
    out, space = Path(out), workspace or Path()
    refuse_others(out)
    load_workspace(workspace)
    with locked(out):
        variants: Mapping[str, Table] = labels_of(experiment)
        # Before anything is run, tuning included: a mistake in an axis must not cost its time.
        tuned = as_tuned(variants, out) if experiment.sweep.tune.trials else variants
        likely = curves(experiment, tuned, space)
        check_runs(plan(experiment, out, variants=likely, workspace=space), watcher)
        if experiment.sweep.tune.trials:
            batches = partial(do, jobs=jobs, watcher=watcher, workspace=space)
            variants = apply(tune(experiment, out, batches, watcher, space, variants), variants)
        runs = plan(experiment, out, variants=curves(experiment, variants, space), workspace=space)
        write_index(experiment, runs, out)
        errors = do(runs, jobs, watcher, space)
    return SweepResult(experiment, out, runs, errors)


def as_tuned(variants: Mapping[str, Table], out: Path) -> dict[str, Table]:
    """Return labels with what an earlier command chose for them: its runs need no other check."""
    found = read_tuning(out) or {"labels": {}}
    chosen = {label: tuned["chosen"] for label, tuned in found["labels"].items()}
    return {label: {**changes, **chosen.get(label, {})} for label, changes in variants.items()}


def refuse_others(out: Path) -> None:
    """Refuse a folder with other results, which a report would no longer find.

    Raises:
        ConfigError: it holds a single run or a comparison.
    """
    other = next((name for name in OTHERS if (out / name).is_file()), None)
    if other is not None and not (out / INDEX).is_file():
        raise ConfigError(
            f"{out} holds a run or a comparison ({other}), whose results a sweep would hide; give "
            "another folder with --out"
        )


def curves(
    experiment: Experiment, variants: Mapping[str, Table], workspace: Path | None = None
) -> dict[str, Table]:
    """Return every label three times where three privacy curves are asked for, else as it is.

    A label without a mechanism of its own (``privacy = "none"``) has no such curves.
    """
    at = experiment.sweep.privacy_at
    if at is None:
        return dict(variants)
    made: dict[str, Table] = {}
    for label, changes in variants.items():
        cell = next(iter(experiment.cells(workspace, {label: changes})))
        if cell.experiment.privacy.unit == "none" and "privacy" in changes:
            made[label] = changes
            continue
        for name, noise in privacy_curves.variants(cell.experiment, at, workspace).items():
            made[f"{label}, {name}"] = {**changes, **noise}
    return made


def check_runs(runs: Sequence[PlannedRun], watcher: SweepWatcher | None = None) -> None:
    """Build the parts of what is to be run once for each label and point, seeds apart.

    Raises:
        ConfigError: with label and point.
    """
    missing = [run for run in runs if RunFolder(run.folder).summary() is None]
    places = len({run.place for run in missing})
    done = 0

    def attempt(made: Experiment) -> None:
        nonlocal done
        if watcher is not None:
            watcher.checking(done, places)
        prepare(made)
        done += 1

    check([Cell(run.place, run.seed, run.experiment) for run in missing], attempt)


def do(
    runs: Sequence[PlannedRun], jobs: int, watcher: SweepWatcher | None, workspace: Path
) -> dict[str, str]:
    """Do the runs that are missing, and return why some have no result, by digest."""
    each = {run.digest: run for run in runs}
    finished = [d for d, run in each.items() if RunFolder(run.folder).summary() is not None]
    if watcher is not None:
        watcher.planned(runs, finished)
    errors: dict[str, str] = {}

    def listen(run: PlannedRun, told: Told) -> None:
        if told[0] == "failed":
            errors[run.digest] = str(told[1]["error"])
        if watcher is not None:
            watcher.told(run, told)

    missing = [run for digest, run in each.items() if digest not in set(finished)]
    run_all(missing, jobs, listen, workspace)
    return errors
