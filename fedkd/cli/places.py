"""Where results go, and which folder ``--resume`` goes on with."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedkd.config import Experiment, load
from fedkd.errors import ConfigError
from fedkd.report.runs import RUN, STUDY, stored

RUNS = "runs"


def read(arguments: Sequence[str], workspace: Path, base: Path | None = None) -> Experiment:
    """Return the experiment that a file and ``key.sub=value`` overrides define.

    Args:
        arguments: in any order; what has no ``=`` is the file.
        workspace: where presets and drop-ins are looked for.
        base: the file to use where none is given.

    Raises:
        ConfigError: two files are given, or what they say is impossible.
    """
    from fedkd.engine.setup import load_workspace

    files = [a for a in arguments if "=" not in a or Path(a).is_file()]
    if len(files) > 1:
        raise ConfigError(
            f"{' and '.join(map(repr, files))}: give one experiment file; everything else is "
            "key.sub=value, as in rounds=5"
        )
    load_workspace(workspace)
    overrides = [a for a in arguments if a not in files]
    return load(files[0] if files else base, overrides, workspace)


def config_of(folder: Path) -> Path:
    """Return the file in which a folder of results keeps its experiment.

    Raises:
        ConfigError: there is none.
    """
    for name in (STUDY, RUN):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"{folder} holds no run to go on with; leave out --resume, or give another --out"
    )


def next_free(workspace: Path, name: str) -> Path:
    """Return ``runs/NAME``, or the first of ``runs/NAME-2``, ``-3``, ... that is not in use."""
    folder, number = workspace / RUNS / name, 1
    while folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        number += 1
        folder = workspace / RUNS / f"{name}-{number}"
    return folder


def newest(workspace: Path, experiment: Experiment) -> Path:
    """Return the newest folder ``runs/NAME*`` that holds this very experiment.

    Raises:
        ConfigError: there is none; says what the newest one of that name differs in.
    """
    numbered = re.compile(re.escape(experiment.name) + r"(-\d+)?")
    found = [
        (config_of(place).stat().st_mtime_ns, place)
        for place in (workspace / RUNS).glob(f"{experiment.name}*")
        if numbered.fullmatch(place.name) and any((place / n).is_file() for n in (STUDY, RUN))
    ]
    if not found:
        where = workspace / RUNS / experiment.name
        raise ConfigError(f"there is nothing to go on with in {where}; leave out --resume")
    for _, place in sorted(found, reverse=True):
        if not differences(stored(place), experiment):
            return place
    last = max(found)[1]
    lines = "; ".join(differences(stored(last), experiment))
    raise ConfigError(
        f"no folder {where_all(workspace, experiment.name)} holds this experiment; {last} differs "
        f"in {lines}. Go on with that one by: {resume_command(last, workspace)}"
    )


def where_all(workspace: Path, name: str) -> str:
    """Return the pattern of the folders of an experiment."""
    return str(workspace / RUNS / f"{name}*")


def differences(there: Experiment, here: Experiment) -> list[str]:
    """Return which keys of two experiments differ, those of the engine aside.

    >>> differences(Experiment(rounds=5), Experiment(rounds=7))
    ['rounds (5 there, 7 here)']
    """
    from fedkd.engine.setup import resolve

    # A stored run has every default written out; what the user typed has not.
    one, two = (_flat(resolve(e).table()) for e in (there, here))
    return [
        f"{key} ({one.get(key, 'none')} there, {two.get(key, 'none')} here)"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key)
        and not key.startswith(("engine.", "audit."))
        and key != "name"
    ]


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value)
    return flat


def resume_command(folder: Path, workspace: Path) -> str:
    """Return the command that goes on with a folder."""
    words = ["fedkd", "run", "--resume", "--out", str(folder)]
    if workspace != Path():
        words += ["--workspace", str(workspace)]
    return shlex.join(words)
