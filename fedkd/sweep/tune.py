"""Options chosen before a sweep, with an equal and recorded number of trials for every label.

A method that was tuned beats one that was not, whatever they are: so nobody is tuned by hand, and
every trial, failed ones included, is in ``tuning.json``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from fedkd.axes import Sweep, Table
from fedkd.config import Experiment
from fedkd.engine.folder import write_text
from fedkd.errors import ConfigError, RunError
from fedkd.sweep.plan import PlannedRun, plan
from fedkd.sweep.search import search
from fedkd.sweep.space import Dimension, dimensions
from fedkd.sweep.trials import Trial, Tuned, Tuning, judged
from fedkd.sweep.tune_rules import check, space_of
from fedkd.sweep.tuning import FILE

RunAll = Callable[[Sequence[PlannedRun]], Mapping[str, str]]
"""Runs what is not finished and returns why it failed, or an empty text, by digest."""


class TuningWatcher(Protocol):
    """Is told of every trial."""

    def trial_finished(self, label: str, trial: Trial, number: int, trials: int) -> None:
        """Take note of one of a label's trials."""


def tune(
    experiment: Experiment,
    out: Path,
    run_all: RunAll,
    watcher: TuningWatcher | None = None,
    workspace: Path | None = None,
    variants: Mapping[str, Table] | None = None,
) -> Tuning:
    """Search options for every label of a sweep and return what was found.

    Each trial is an ordinary run in ``out/runs/<digest>`` at ``tune.at`` with ``tune.seed``. Every
    label is asked for one trial at a time, and these run together, so how many run at once changes
    nothing. Options that were tried before are not run again, but count as a trial.

    Args:
        experiment: with its ``sweep.tune``; 0 trials: nothing is done.
        out: folder of the sweep; ``tuning.json`` is written there after every trial.
        run_all: runs what is not finished yet.
        watcher: is told of every trial.
        workspace: where presets are looked for.
        variants: what differs by label; by default the strategies of the experiment.

    Raises:
        ConfigError: what is asked for is impossible or unfair; found before the first trial.
        RunError: every trial of a label failed, so there is nothing to choose.
    """
    asked = experiment.sweep.tune
    labels = dict(experiment.variants() if variants is None else variants)
    if asked.trials == 0:
        return Tuning(asked, {})
    check(experiment, labels)
    make = _Maker(experiment, labels, out, workspace)
    spaces = {label: dimensions(space_of(asked, label), "sweep.tune.space") for label in labels}
    searches = {label: search(asked, label, space) for label, space in spaces.items()}
    for label, space in spaces.items():
        make.check(label, space)
    tuning = Tuning(asked, {label: Tuned(s.method) for label, s in searches.items()})
    known: dict[str, tuple[float | None, str]] = {}
    for number in range(1, asked.trials + 1):
        tried = {k: (s, s.ask()) for k, s in searches.items() if number <= s.trials}
        runs = {label: make.run(label, options) for label, (_, options) in tried.items()}
        new = {r.digest: r for r in runs.values() if isinstance(r, PlannedRun)}
        missing = [run for digest, run in new.items() if digest not in known]
        failed = run_all(missing) if missing else {}
        known |= {run.digest: judged(run, failed.get(run.digest, "")) for run in missing}
        for label, (one, options) in tried.items():
            run = runs[label]
            trial = (
                Trial(options, None, "", run)
                if isinstance(run, str)
                else Trial(options, known[run.digest][0], run.digest, known[run.digest][1])
            )
            one.tell(trial.validation)
            tuning.labels[label].trials.append(trial)
            write_text(out / FILE, json.dumps(tuning.table(), indent=1) + "\n")
            if watcher is not None:
                watcher.trial_finished(label, trial, number, one.trials)
    for label, found in tuning.labels.items():
        if found.best is None:
            raise RunError(
                f"tuning: every trial of {label!r} failed, the last with: {found.trials[-1].error}"
            )
    return tuning


def apply(tuning: Tuning, variants: Mapping[str, Table]) -> dict[str, Table]:
    """Return what differs by label, with the chosen options; what an axis sets comes after these.

    Raises:
        ConfigError: a label was not tuned, which would compare it unfairly.
    """
    if not tuning.labels:
        return dict(variants)
    made = {}
    for label, changes in variants.items():
        best = tuning.labels[label].best if label in tuning.labels else None
        if best is None:
            raise ConfigError(f"{label!r} was not tuned, though others were; tune it as well")
        made[label] = {**changes, **best.options}
    return made


@dataclass(frozen=True)
class _Maker:
    """Makes runs of trials."""

    experiment: Experiment
    labels: Mapping[str, Table]
    out: Path
    workspace: Path | None

    def run(self, label: str, options: Table) -> PlannedRun | str:
        """Return the run of a trial, or why these options exclude each other."""
        try:
            return self.planned(label, options)
        except ConfigError as error:
            return str(error)

    def planned(self, label: str, options: Table) -> PlannedRun:
        asked = self.experiment.sweep.tune
        alone = replace(self.experiment, compare={}, sweep=Sweep(), seed=asked.seed, seeds=())
        changes = {**self.labels[label], **asked.at, **options}
        [run] = plan(alone, self.out, variants={label: changes}, workspace=self.workspace)
        return replace(run, point=options)

    def check(self, label: str, space: Sequence[Dimension]) -> None:
        """Build every value of a label's lists and the ends of its ranges once, one at a time.

        Raises:
            ConfigError: a key or a value that this label does not have, or no validation data.
        """
        try:
            run = self.planned(label, {})
        except ConfigError as error:
            raise type(error)(f"sweep.tune.at: {error}") from None
        if run.experiment.data.validation == 0:
            raise ConfigError(
                "sweep.tune judges trials by validation accuracy, but data.validation = 0; hold "
                "some back, for instance data.validation = 0.1"
            )
        for dimension in space:
            for value in dimension.samples():
                try:
                    self.planned(label, {dimension.key: value})
                except ConfigError as error:
                    raise type(error)(
                        f"sweep.tune, {label!r}: {error}; what only some labels have belongs in "
                        "sweep.tune.labels, under their names"
                    ) from None
