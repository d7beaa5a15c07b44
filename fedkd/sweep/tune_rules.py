"""What a search of options must not do: choose on the sweep's seeds, on other data, or on privacy.

Everything here is known before the first trial, and refused there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedkd.axes import FORBIDDEN, SEEDS, STRATEGY, Space, Sweep, Table, Tune
from fedkd.config import Experiment
from fedkd.errors import ConfigError, unknown

JUDGES = (
    "data.source",
    "data.partition",
    "data.validation",
    "data.manifest",
    "clients.count",
    "evaluate",
)
"""What trials are judged on: not to be searched, or they would not be compared on the same."""
CLAIMS = tuple(
    f"privacy.{name}"
    for name in (
        *("unit", "trust", "adjacency", "accountant"),
        *("epsilon", "noise_multiplier", "mean_noise", "delta", "max_epsilon"),
    )
)
"""What accuracy does not see the price of: a search would always take the least privacy."""


def space_of(asked: Tune, label: str) -> Space:
    """Return what is searched for a label: its own keys on top of everybody's."""
    return {**asked.space, **asked.labels.get(label, {})}


def check(experiment: Experiment, labels: Mapping[str, Table]) -> None:
    """Refuse what would make the comparison unfair, or trials incomparable.

    Raises:
        ConfigError: names the key and the fix.
    """
    sweep, asked = experiment.sweep, experiment.sweep.tune
    if asked.seed in (experiment.seeds or (experiment.seed,)):
        raise ConfigError(
            f"sweep.tune.seed = {asked.seed} is a seed of the sweep, whose results would be those "
            "that options were chosen on; give tune another one"
        )
    stranger = next((label for label in asked.labels if label not in labels), None)
    if stranger is not None:
        raise unknown("label", stranger, labels, "sweep.tune.labels")
    searched = {key for label in labels for key in space_of(asked, label)}
    if not searched:
        raise ConfigError(
            "sweep.tune has trials but nothing to search; give it a space, as in [sweep.tune.space]"
            ' "clients.training.lr" = [0.03, 0.1, 0.3]'
        )
    for key in (*searched, *asked.at):
        _check_key(key, key in searched, asked, sweep)
    for label, changes in labels.items():
        fixed = _keys(changes)
        for key in space_of(asked, label):
            if any(f"{other}.".startswith(f"{key}.") for other in fixed):
                raise ConfigError(
                    f"{key} is searched, but {label!r} sets it itself; leave it out of one of them"
                )


def _check_key(key: str, searched: bool, asked: Tune, sweep: Sweep) -> None:
    if key in (*SEEDS, STRATEGY, f"{STRATEGY}.name") or key.partition(".")[0] in FORBIDDEN:
        raise ConfigError(f"{key!r} is nothing to search or to fix in sweep.tune; leave it out")
    if not searched:
        return
    for kind, keys in (("what trials are judged on", JUDGES), ("what is claimed", CLAIMS)):
        if any(_overlap(key, other) for other in keys):
            raise ConfigError(
                f"{key!r} is {kind}, which validation accuracy cannot choose; set it in sweep.tune."
                "at, or for the whole experiment"
            )
    for where, keys in (("swept over", tuple(sweep.axes())), ("in sweep.tune.at", tuple(asked.at))):
        if any(_overlap(key, other) for other in keys if other != STRATEGY):
            raise ConfigError(f"{key!r} is searched by sweep.tune and {where}; leave one out")


def _overlap(one: str, other: str) -> bool:
    """Return whether two keys are the same, or one is a table that holds the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _keys(changes: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the keys that changes set, nested ones in full."""
    found = []
    for key, value in changes.items():
        full = prefix + key
        found += _keys(value, f"{full}.") if isinstance(value, Mapping) else [full]
    return found
