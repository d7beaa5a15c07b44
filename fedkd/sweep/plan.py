"""Which runs a sweep consists of: labels x points x seeds, each named by what it follows from.

Runs lie in ``runs/<digest>``: the digest is a hash of everything that a result depends on, so a
repeated, interrupted or extended sweep does only what is missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedkd.axes import STRATEGY, Sweep, Table, named, points
from fedkd.config import Experiment
from fedkd.engine.folder import write_text
from fedkd.engine.setup import resolve
from fedkd.errors import ConfigError

INDEX, CONFIG, RUNS = "sweep.json", "sweep.toml", "runs"
VERSION = 1


@dataclass(frozen=True)
class PlannedRun:
    """One run: its label, where it lies on the axes, its seed, and what it is."""

    label: str
    point: Table
    seed: int
    experiment: Experiment
    digest: str
    folder: Path

    @property
    def place(self) -> str:
        """Label and point in one line."""
        at = [f"{key.rsplit('.', 1)[-1]}={named(value)}" for key, value in self.point.items()]
        return ", ".join([self.label, *at])

    @property
    def title(self) -> str:
        """Label, point and seed in one line."""
        return f"{self.place}, seed {self.seed}"


def plan(
    experiment: Experiment,
    out: Path,
    *,
    variants: Mapping[str, Table] | None = None,
    workspace: Path | None = None,
) -> list[PlannedRun]:
    """Return all runs of a sweep, labels first, then points, then seeds.

    Args:
        experiment: with its ``sweep``; one without axes is a comparison of one point.
        out: folder of the sweep.
        variants: what differs by label; by default the strategies of the experiment.
        workspace: where presets are looked for.

    Raises:
        ConfigError: an axis or a value is impossible, with label and point.
    """
    labels = labels_of(experiment) if variants is None else dict(variants)
    axes = _free(experiment.sweep)
    made = []
    for label, changes in labels.items():
        for point in points(axes):
            try:
                cells = list(experiment.cells(workspace, {label: {**changes, **point}}))
                full = [resolve(replace(c.experiment, name=experiment.name)) for c in cells]
            except ConfigError as error:
                where = f"{label!r} at {_where(point)}" if point else repr(label)
                raise type(error)(f"in {where}: {error}") from None
            for one in full:
                digest = one.digest()
                made.append(PlannedRun(label, point, one.seed, one, digest, out / RUNS / digest))
    return made


def labels_of(experiment: Experiment) -> dict[str, Table]:
    """Return what differs by label: strategies with what moves with them in ``sweep.zip``.

    Raises:
        ConfigError: two strategies would have the same label.
    """
    sweep = experiment.sweep
    if STRATEGY not in sweep.zip:
        made = experiment.variants()
        if len(made) < len(sweep.grid.get(STRATEGY, ())):
            raise ConfigError(
                "two values of the strategy axis are named alike (numbers with six digits, and 1 "
                "as '1'): use compare.LABEL tables in place of it"
            )
        return made
    rows = list(points(replace(sweep, grid={})))
    labels = {named(row[STRATEGY]): dict(row) for row in rows}
    if len(labels) < len(rows):
        raise ConfigError(
            "sweep.zip.strategy names a strategy twice, so its rows have no labels of their own: "
            "use compare.LABEL tables in place of it"
        )
    return labels


def _free(sweep: Sweep) -> Sweep:
    """Return the axes that are not tied to labels."""
    grid = {key: values for key, values in sweep.grid.items() if key != STRATEGY}
    return replace(sweep, grid=grid, zip={} if STRATEGY in sweep.zip else sweep.zip)


def _where(point: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {named(value)}" for key, value in point.items())


def axes_of(runs: Sequence[PlannedRun]) -> dict[str, list[Any]]:
    """Return each axis with its values, in the order in which they were given."""
    axes: dict[str, list[Any]] = {}
    for run in runs:
        for key, value in run.point.items():
            values = axes.setdefault(key, [])
            if value not in values:
                values.append(value)
    return axes


def write_index(experiment: Experiment, runs: Sequence[PlannedRun], out: Path) -> None:
    """Write ``sweep.toml`` and ``sweep.json``: which run of the folder stands for what."""
    table = {
        "version": VERSION,
        "name": experiment.name,
        "axes": axes_of(runs),
        "labels": list(dict.fromkeys(run.label for run in runs)),
        "seeds": sorted({run.seed for run in runs}),
        "runs": [
            {
                "label": run.label,
                "point": run.point,
                "seed": run.seed,
                "digest": run.digest,
                "folder": f"{RUNS}/{run.digest}",
            }
            for run in runs
        ],
    }
    write_text(out / CONFIG, experiment.toml())
    write_text(out / INDEX, json.dumps(table, indent=1) + "\n")


def read_index(folder: Path) -> dict[str, Any]:
    """Return what ``sweep.json`` holds.

    Raises:
        ConfigError: it is damaged, of another version, or names folders outside of its own.
    """
    file = folder / INDEX
    try:
        table: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if table["version"] != VERSION:
            raise ValueError(f"version {table['version']!r}, not {VERSION}")
        for run in table["runs"]:
            if run["folder"] != f"{RUNS}/{run['digest']}" or not str(run["digest"]).isalnum():
                raise ValueError(f"folder {run['folder']!r} is not that of run {run['digest']!r}")
            if dict(run["point"]).keys() != table["axes"].keys():
                raise ValueError(f"run {run['digest']!r} is not at a point of the axes")
            _ = run["label"], int(run["seed"])
        _ = table["name"], dict(table["axes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error!r}); make it again with the fedkd sweep that made it"
        ) from None
    return table
