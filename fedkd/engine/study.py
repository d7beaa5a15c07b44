"""A comparison: the runs of one experiment file, each in a folder of its own, one table at the end.

A run that fails is reported and the others go on; a run that is finished is not done again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedkd.config import Cell, Experiment
from fedkd.engine.folder import write_text
from fedkd.engine.setup import prepare
from fedkd.engine.simulation import Watcher, run
from fedkd.errors import ConfigError, FedkdError


@dataclass(frozen=True)
class CellResult:
    """What became of one run: its summary, or the reason why it has none."""

    label: str
    seed: int
    folder: Path
    summary: dict[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class StudyResult:
    """All runs of a comparison, in the order of the experiment file."""

    experiment: Experiment
    folder: Path
    cells: list[CellResult] = field(default_factory=list)

    @property
    def failed(self) -> list[CellResult]:
        """The runs without a result."""
        return [cell for cell in self.cells if cell.summary is None]

    def labels(self) -> list[str]:
        """The labels in order."""
        return list(dict.fromkeys(cell.label for cell in self.cells))


class StudyWatcher(Watcher, Protocol):
    """Is told of every run of a comparison as well as of its rounds."""

    def planned(self, cells: Sequence[Cell]) -> None:
        """Take note of all runs before the first."""

    def cell_started(self, cell: Cell, folder: Path) -> None:
        """Begin a run."""

    def cell_finished(self, result: CellResult) -> None:
        """Take note of a run's result."""


def run_study(
    experiment: Experiment,
    out: str | Path,
    *,
    resume: bool = False,
    watcher: StudyWatcher | None = None,
    workspace: Path | None = None,
) -> StudyResult:
    """Run an experiment with everything it is compared to, for each of its seeds.

    A single run uses ``out`` itself; several use ``out/<label>/seed-<seed>``.

    Raises:
        ConfigError: some run is impossible: found before the first one starts, with its label.
            Also if ``out`` holds results and ``resume`` was not asked for.
    """
    out = Path(out)
    cells = list(experiment.cells(workspace))
    if out.exists() and any(out.iterdir()) and not resume:
        raise ConfigError(f"{out} is not empty; add --resume to go on there, or give another --out")
    check(cells)
    result = StudyResult(experiment, out)
    if watcher is not None:
        watcher.planned(cells)
    if len(cells) > 1:
        write_text(out / "study.toml", experiment.toml())
    for cell, folder in zip(cells, folders(cells, out), strict=True):
        if watcher is not None:
            watcher.cell_started(cell, folder)
        try:
            summary = run(cell.experiment, folder, resume=resume, watcher=watcher)
            done = CellResult(cell.label, cell.seed, folder, summary)
        except ConfigError:
            raise
        except FedkdError as error:
            done = CellResult(cell.label, cell.seed, folder, None, str(error))
        result.cells.append(done)
        if watcher is not None:
            watcher.cell_finished(done)
    return result


def check(cells: Sequence[Cell], attempt: Callable[[Experiment], object] = prepare) -> None:
    """Build the parts of every run once, so that no run fails late for a reason known early.

    Seeds of one label differ in nothing that can be wrong, so one of each label is enough.

    Raises:
        ConfigError: what ``attempt`` raised, with the label where there are several.
    """
    seen = set()
    for cell in cells:
        if cell.label in seen:
            continue
        seen.add(cell.label)
        try:
            attempt(cell.experiment)
        except ConfigError as error:
            if len({c.label for c in cells}) == 1:
                raise
            raise type(error)(f"in {cell.label!r}: {error}") from None


def folders(cells: Sequence[Cell], out: Path) -> list[Path]:
    """Return the folder of each run.

    Raises:
        ConfigError: two labels would share a folder.
    """
    if len(cells) == 1:
        return [out]
    slugs = {label: slug(label) for label in dict.fromkeys(cell.label for cell in cells)}
    if len(set(slugs.values())) < len(slugs):
        raise ConfigError(f"labels in compare are too much alike for folders: {sorted(slugs)}")
    return [out / slugs[cell.label] / f"seed-{cell.seed}" for cell in cells]


def slug(label: str) -> str:
    """Return a label as a folder name.

    >>> slug("FedAvg + fine-tuning"), slug("../x")
    ('fedavg-fine-tuning', 'x')
    """
    return re.sub(r"[^a-z0-9._]+", "-", label.lower()).strip("-._") or "run"
