"""Runs from any number of folders as one collection: labels, points on axes, seeds.

A folder holds a sweep, a comparison or a single run. Where folders differ in what they were run
with, what differs becomes an axis, so that two sweeps over parts of an axis are one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from fedkd.config import Experiment
from fedkd.engine.setup import resolve
from fedkd.errors import ConfigError
from fedkd.report.curves import Curves
from fedkd.report.folders import Entry, Found, read_folder
from fedkd.report.runs import RunView

Value = str | int | float | bool
RATIO = "clients.participation.ratio"
SWEEP, FEW = "sweep", 3
"""The axis of folders that differ in more than a few options, which would all be axes else."""
STATES = ("finished", "running", "failed", "waiting")
"""How far a run is, the furthest first."""
TITLES = {
    RATIO: "participation ratio",
    "clients.participation.scheme": "participation scheme",
    "clients.participation.availability": "availability",
    "clients.participation.dropout": "drop-out",
    "clients.participation.deadline": "deadline",
    "clients.count": "clients",
    "clients.training.epochs": "local epochs",
    "clients.training.lr": "learning rate",
    "data.partition.alpha": "Dirichlet alpha",
    "data.partition.name": "partition",
    "data.source.name": "data",
    "privacy.epsilon": "epsilon",
    "privacy.noise_multiplier": "noise multiplier",
    "privacy.mean_noise": "noise on the mean",
    "model.name": "model",
    "rounds": "rounds",
    "sweep": "sweep",
}


@dataclass(frozen=True)
class Missing:
    """A run without a result: why, and how far it came."""

    seed: int
    state: Literal["failed", "running", "waiting"]
    reason: str
    folder: Path
    rounds_done: int = 0


@dataclass(frozen=True, eq=False)
class Group:
    """One label at one point: its seeds are the independent runs of every statistic."""

    label: str
    point: dict[str, Value]
    runs: list[RunView] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    @cached_property
    def curves(self) -> list[Curves]:
        """Each run by round, in the order of ``runs``."""
        return [run.curves for run in self.runs]

    @property
    def strategy(self) -> str:
        """The name of the strategy; empty without a run."""
        return str(self.runs[0].summary["strategy"]) if self.runs else ""

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that have a result."""
        return tuple(run.seed for run in self.runs)


@dataclass(frozen=True, eq=False)
class Collection:
    """All runs of some folders; ``axes`` holds what varies, with its values in ascending order."""

    name: str
    folders: tuple[Path, ...]
    axes: dict[str, tuple[Value, ...]]
    labels: tuple[str, ...]
    groups: list[Group]
    tuning: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    def points(self) -> list[dict[str, Value]]:
        """Return every point that has a group, in order."""
        found: list[dict[str, Value]] = []
        for group in self.groups:
            if group.point not in found:
                found.append(group.point)
        return sorted(found, key=lambda point: _rank(point, self.axes))

    def group(self, label: str, point: Mapping[str, Value]) -> Group | None:
        """Return the group of a label at a point."""
        return next((g for g in self.groups if g.label == label and g.point == dict(point)), None)

    def along(self, axis: str, label: str, rest: Mapping[str, Value]) -> list[tuple[Value, Group]]:
        """Return a label's groups by ascending value of an axis, the other axes as in ``rest``."""
        wanted = dict(rest)
        return [
            (group.point[axis], group)
            for value in self.axes[axis]
            for group in self.groups
            if group.label == label
            and group.point.get(axis) == value
            and {k: v for k, v in group.point.items() if k != axis} == wanted
        ]

    def slices(self, axis: str) -> list[dict[str, Value]]:
        """Return every combination of the other axes that has a group."""
        found: list[dict[str, Value]] = []
        for point in self.points():
            rest = {k: v for k, v in point.items() if k != axis}
            if rest not in found:
                found.append(rest)
        return found


def axis_title(key: str) -> str:
    """Return what an axis is called in figures and tables.

    >>> axis_title(RATIO), axis_title("strategy.drop_every")
    ('participation ratio', 'drop every')
    """
    return TITLES.get(key, key.rsplit(".", 1)[-1].replace("_", " "))


def collect(
    folders: Sequence[str | Path], *, workspace: Path | None = None, partial: bool = False
) -> Collection:
    """Return the runs of some folders as one collection; nothing is run and nothing is written.

    Args:
        folders: each a sweep, a comparison or a run.
        workspace: where presets are looked for.
        partial: runs under way count with what they have so far, for the live page.

    Raises:
        ConfigError: a folder holds no runs, or there is none.
    """
    if not folders:
        raise ConfigError("name at least one folder of a run, a comparison or a sweep")
    found = [read_folder(Path(folder), workspace, partial) for folder in folders]
    keys, differing = _axes(found)
    # What stands for different options in two folders is told apart by their names then.
    named = [*keys, *differing]
    labels, names = _labels(found, named), _names(found)
    groups: dict[tuple[Any, ...], Group] = {}
    chosen: dict[tuple[Any, ...], dict[int, Entry]] = {}
    for index, holding in enumerate(found):
        for entry in holding.entries:
            label = labels[index, entry.label]
            point = {key: names[index] if key == SWEEP else _at(entry, key) for key in keys}
            address = (label, *map(_key, point.values()))
            groups.setdefault(address, Group(label, point))
            seeds = chosen.setdefault(address, {})
            seeds[entry.seed] = _better(seeds.get(entry.seed), entry)
    for address, group in groups.items():
        for entry in chosen[address].values():
            _put(group, entry)
    axes = {key: _ascending([g.point[key] for g in groups.values()]) for key in keys}
    order = list(dict.fromkeys(labels.values()))
    for group in groups.values():
        group.runs.sort(key=lambda run: run.seed)
        group.missing.sort(key=lambda missing: missing.seed)
    return Collection(
        name=" + ".join(dict.fromkeys(holding.name for holding in found)),
        folders=tuple(holding.folder for holding in found),
        axes=axes,
        labels=tuple(order),
        groups=sorted(groups.values(), key=lambda g: (order.index(g.label), _rank(g.point, axes))),
        tuning=next((h.tuning for h in found if h.tuning), None),
        notes=_differing(differing),
    )


def _put(group: Group, entry: Entry) -> None:
    if entry.summary is not None:
        group.runs.append(RunView(group.label, entry.seed, entry.folder, entry.summary))
    if entry.state != "finished":
        group.missing.append(
            Missing(entry.seed, entry.state, entry.reason, entry.folder, entry.rounds_done)
        )


def _better(before: Entry | None, entry: Entry) -> Entry:
    """Return one of two entries of the same run, that which is further.

    Raises:
        ConfigError: they are not the same run.
    """
    if before is None or before.folder == entry.folder:
        return entry if before is None else before
    both = before.begun and entry.begun
    if both and before.experiment.digest() != entry.experiment.digest():
        one, two = flat(before.experiment), flat(entry.experiment)
        keys = [key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key)]
        raise ConfigError(
            f"{before.folder} and {entry.folder} are both {entry.label!r} with seed {entry.seed} "
            f"at the same point, but differ in {', '.join(keys) or 'their data'}; give one of them "
            "another label, or report them one by one"
        )
    return min(before, entry, key=lambda e: STATES.index(e.state))


def _axes(found: Sequence[Found]) -> tuple[list[str], list[str]]:
    """Return the axes, and what folders differ in beside them where that is too much for axes."""
    keys = list(dict.fromkeys(key for holding in found for key in holding.axes))
    if len(found) == 1:
        return keys, []
    # Runs have the options of their components written out, files of sweeps have not.
    tables = [flat(resolve(holding.experiment)) for holding in found]
    more: list[str] = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values = {json.dumps(table.get(key)) for table in tables}
        if len(values) > 1 and not _covered(key, [*keys, *more, "strategy", "seed"]):
            entries = (entry for holding in found for entry in holding.entries)
            if len({_key(_at(entry, key)) for entry in entries}) > 1:
                more.append(key)
    return ([*keys, *more], []) if len(more) <= FEW else ([SWEEP, *keys], more)


def _names(found: Sequence[Found]) -> list[str]:
    """Return a name for each folder: that of its experiment, or of itself where that is taken."""
    names = [holding.name for holding in found]
    if len(set(names)) < len(names):
        names = [holding.folder.resolve().name for holding in found]
    return [f"{name} {i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _differing(keys: Sequence[str]) -> tuple[str, ...]:
    if not keys:
        return ()
    return (
        f"The folders differ in {', '.join(keys)}: too much for axes. They stand side by side, and "
        "no difference between them has one reason.",
    )


def _covered(key: str, others: Sequence[str]) -> bool:
    """Return whether a key is one of others, or in a table that one of them is."""
    return any(f"{key}.".startswith(f"{other}.") for other in others)


def _key(value: Value) -> tuple[bool, Value]:
    # 1 and 1.0 are one point, 1 and true are not.
    return isinstance(value, bool), value


def flat(experiment: Experiment) -> dict[str, Any]:
    """Return what a result depends on as ``key.sub`` -> value; lists as text."""
    table = experiment.table()
    for key in ("name", "engine", "compare", "seeds", "audit", "sweep"):
        table.pop(key, None)
    found: dict[str, Any] = {}

    def add(prefix: str, inner: Mapping[str, Any]) -> None:
        for key, value in inner.items():
            if isinstance(value, Mapping):
                add(f"{prefix}{key}.", value)
            else:
                plain = isinstance(value, str | int | float | bool)
                found[prefix + key] = value if plain else json.dumps(value)

    add("", table)
    return found


def _at(entry: Entry, key: str) -> Value:
    if key in entry.point:
        value = entry.point[key]
        return value if isinstance(value, str | int | float | bool) else json.dumps(value)
    held = flat(entry.experiment)
    inner = {k.removeprefix(f"{key}."): v for k, v in held.items() if k.startswith(f"{key}.")}
    if inner:
        return str(inner["name"]) if "name" in inner else json.dumps(inner)
    return cast(Value, held.get(key, "none"))


def _labels(found: Sequence[Found], keys: Sequence[str]) -> dict[tuple[int, str], str]:
    """Return labels; one that stands for different things in two folders is told apart.

    What it stands for is everything that its runs were made with, apart from axes and seeds.
    """
    meant: dict[str, list[str]] = {}
    labels: dict[tuple[int, str], str] = {}
    for index, holding in enumerate(found):
        for entry in holding.entries:
            if (index, entry.label) in labels:
                continue
            same = [e for e in holding.entries if e.label == entry.label]
            what = ""
            if len(found) > 1:
                # Only a run that has begun has the options that tuning chose.
                what = _meaning(next((e for e in same if e.begun), entry), keys)
            known = meant.setdefault(entry.label, [])
            if what not in known:
                known.append(what)
            number = known.index(what)
            # Two folders may have the same name.
            more = f" {number + 1}" if number > 1 else ""
            own = f"{entry.label} ({holding.name}{more})" if number else entry.label
            labels[index, entry.label] = own
    return labels


def _meaning(entry: Entry, keys: Sequence[str]) -> str:
    table = flat(entry.experiment)
    kept = {key: value for key, value in table.items() if not _covered(key, [*keys, "seed"])}
    return json.dumps(kept, sort_keys=True)


def _ascending(values: Sequence[Value]) -> tuple[Value, ...]:
    unique = list(dict.fromkeys(values))
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in unique)
    return tuple(sorted(unique, key=float)) if numbers else tuple(unique)


def _rank(point: Mapping[str, Value], axes: Mapping[str, Sequence[Value]]) -> tuple[int, ...]:
    return tuple(list(axes[key]).index(value) for key, value in point.items())
