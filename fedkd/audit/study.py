"""The audit of a comparison: run what is missing, audit every run, keep what is finished.

Runs lie in ``runs/<hash of what they follow from>``, so that an interrupted audit, or one whose
file has changed in a part, does only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fedkd.audit import possible
from fedkd.audit.references import AuditWatcher, reference_seeds
from fedkd.audit.run import audit_run
from fedkd.config import Cell, Experiment
from fedkd.engine.folder import RunFolder, write_text
from fedkd.engine.setup import resolve
from fedkd.engine.simulation import run
from fedkd.engine.study import CellResult, check
from fedkd.errors import ConfigError, FedkdError

RESULTS = "audits.json"
"""File of an audit's folder: the results of all its runs."""
REFERENCE = "reference"


class AuditStudyWatcher(AuditWatcher, Protocol):
    """Is told of every run that an audit needs as well."""

    def planned(self, cells: Sequence[Cell]) -> None:
        """Take note of all runs before the first."""

    def cell_started(self, cell: Cell, folder: Path) -> None:
        """Begin a run."""

    def cell_finished(self, result: CellResult) -> None:
        """Take note of a run's result."""


@dataclass(frozen=True)
class AuditResult:
    """What an audit found: one result a run, and what failed with its reason."""

    folder: Path
    results: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)


def audit_study(
    experiment: Experiment,
    out: str | Path,
    *,
    watcher: AuditStudyWatcher | None = None,
    workspace: Path | None = None,
) -> AuditResult:
    """Run an experiment with all that it is compared to and its reference models; audit each run.

    What failed is reported and the rest goes on; results are written as they come.

    Raises:
        ConfigError: a run is impossible, found before the first one starts; or plants no canary.
    """
    out = Path(out)
    targets = [replace(c, experiment=resolve(c.experiment)) for c in experiment.cells(workspace)]
    for cell in targets:
        canaries = cell.experiment.canaries
        if canaries.kind == "none" and not canaries.random_clients:
            raise ConfigError(
                f"in {cell.label!r}: no canary is planted, so there is nothing to audit; set "
                "canaries.kind = 'text', 'random-image' or 'mislabelled', or random_clients"
            )
    check(targets, possible.check)
    cells = _all(targets)
    folders = {digest: out / "runs" / digest for digest in cells}
    if watcher is not None:
        watcher.planned(list(cells.values()))
    errors = {digest: _run(cell, folders[digest], watcher) for digest, cell in cells.items()}
    result = AuditResult(out)
    for cell in targets:
        digest = cell.experiment.digest()
        error = errors[digest]
        if not error:
            if watcher is not None:
                watcher.doing(f"audit of {cell.label}, seed {cell.seed}")
            try:
                found = audit_run(
                    folders[digest],
                    cell.experiment.audit,
                    label=cell.label,
                    cache=out / "students",
                    known={d: f for d, f in folders.items() if not errors[d]},
                    watcher=watcher,
                )
                result.results.append(found)
            except FedkdError as problem:
                error = str(problem)
        if error:
            result.failed.append({"label": cell.label, "seed": cell.seed, "error": error})
        _write(result)
    return result


def _all(targets: Sequence[Cell]) -> dict[str, Cell]:
    """Return every run that is needed, by its digest: targets, then reference models."""
    cells = {c.experiment.digest(): c for c in targets}
    for cell in targets:
        experiment = cell.experiment
        # Canary clients alone need no other run to be compared with.
        count = experiment.audit.reference_models if experiment.canaries.kind != "none" else 0
        for seed in reference_seeds(experiment.seed, count):
            other = replace(experiment, seed=seed)
            cells.setdefault(other.digest(), Cell(f"{cell.label}, {REFERENCE}", seed, other))
    return cells


def _run(cell: Cell, folder: Path, watcher: AuditStudyWatcher | None) -> str:
    """Run one experiment, or go on with it; return why it failed, or nothing."""
    if watcher is not None:
        watcher.cell_started(cell, folder)
    summary, error = None, ""
    try:
        summary = run(cell.experiment, folder, resume=RunFolder(folder).exists(), watcher=watcher)
    except FedkdError as problem:
        error = str(problem)
    if watcher is not None:
        watcher.cell_finished(CellResult(cell.label, cell.seed, folder, summary, error))
    return error


def _write(result: AuditResult) -> None:
    table = {"results": result.results, "failed": result.failed}
    write_text(result.folder / RESULTS, json.dumps(table, indent=1, allow_nan=False) + "\n")
