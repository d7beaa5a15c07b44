"""What a sweep varies: axes of a grid, axes that move together, how it is tuned; all of it data.

An axis is a key of an experiment file with the values that it takes, as in
``clients.participation.ratio = [0.05, 0.1, 0.2]``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fedkd.errors import ConfigError
from fedkd.options import options

Table = dict[str, Any]
STRATEGY, SEEDS = "strategy", ("seed", "seeds")
FORBIDDEN = ("name", "compare", "sweep", "audit", "engine")
"""Keys that change no result, or that a sweep has other ways to give."""


def _axes(given: Any) -> Any:
    """Take one value for a list of one; refuse an axis without values, or with one twice."""
    if not isinstance(given, Mapping):
        raise ValueError("give key = [value, value, ...]")
    axes = {}
    for key, values in given.items():
        several = list(values) if isinstance(values, list | tuple) else [values]
        if not several:
            raise ValueError(f"{key} has no values")
        texts = {json.dumps(_one(v), sort_keys=True, default=str) for v in several}
        if len(texts) < len(several):
            raise ValueError(f"{key} names a value twice")
        axes[str(key)] = tuple(several)
    return axes


def _one(value: Any) -> Any:
    """Return the same for 1 and 1.0, which are one point."""
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


Axes = Annotated[dict[str, tuple[Any, ...]], BeforeValidator(_axes)]
Space = dict[str, Any]


@options
class Tune:
    """Search for options before the sweep, with the same number of trials for every label.

    Trials are judged by the validation accuracy on ``seed``, which the sweep does not use. A space
    is key -> list of values, or a table {low, high, log, step}; ``labels`` holds further keys for
    single labels.
    """

    trials: Annotated[int, Field(ge=0, description="trials of each label; 0: no tuning")] = 0
    seed: Annotated[int, Field(ge=0, description="seed of all trials and of the search")] = 1000
    method: Annotated[
        Literal["tpe", "random", "grid"],
        Field(description="how trials are chosen; grid takes lists only"),
    ] = "tpe"
    at: Annotated[
        dict[str, Any], Field(description="what trials are run with, as the axes' middle values")
    ] = dataclasses.field(default_factory=dict)
    space: Annotated[Space, Field(description="key -> values or range, for every label")] = (
        dataclasses.field(default_factory=dict)
    )
    labels: Annotated[
        dict[str, Space], Field(description="label -> what is searched for it beside that")
    ] = dataclasses.field(default_factory=dict)


@options
class Sweep:
    """The axes of a sweep: every point of ``grid`` with every step of ``zip``, for every seed.

    Keys of ``zip`` move together, so their lists are of equal length. With ``privacy_at`` every
    label is run three times, with noise that follows the ratio in three ways which agree at this
    participation ratio: fixed noise multiplier, fixed epsilon, fixed noise on the mean.
    """

    grid: Annotated[Axes, Field(description="key -> values; all combinations")] = dataclasses.field(
        default_factory=dict
    )
    zip: Annotated[Axes, Field(description="key -> values; the lists move together")] = (
        dataclasses.field(default_factory=dict)
    )
    privacy_at: Annotated[
        float | None,
        Field(gt=0, le=1, description="participation ratio where three privacy curves meet"),
    ] = None
    tune: Tune = Tune()

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Return all keys with their values, those of ``grid`` first."""
        return {**self.grid, **self.zip}


def points(sweep: Sweep) -> Iterator[Table]:
    """Return what differs at each point, key -> value; one empty point where nothing varies.

    Raises:
        ConfigError: lists of ``zip`` differ in length, or a key is impossible as an axis.

    >>> list(points(Sweep(grid={"rounds": [1, 2]}, zip={"a.b": [3, 4], "c": [5, 6]})))[1:3]
    [{'rounds': 1, 'a.b': 4, 'c': 6}, {'rounds': 2, 'a.b': 3, 'c': 5}]
    """
    _check(sweep)
    grid = [[(key, value) for value in values] for key, values in sweep.grid.items()]
    moving = [
        [(key, values[i]) for key, values in sweep.zip.items()]
        for i in range(max((len(v) for v in sweep.zip.values()), default=1))
    ]
    for chosen in itertools.product(*grid):
        for together in moving:
            yield dict([*chosen, *together])


def _check(sweep: Sweep) -> None:
    lengths = {key: len(values) for key, values in sweep.zip.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} has {n}" for key, n in lengths.items())
        raise ConfigError(
            f"sweep.zip: {listed} values; keys that move together need lists of equal length"
        )
    both = sweep.grid.keys() & sweep.zip.keys()
    if both:
        raise ConfigError(f"{sorted(both)[0]} is in sweep.grid and in sweep.zip; leave one out")
    for key in sweep.axes():
        if key in SEEDS:
            raise ConfigError(f"{key!r} is no axis: give seeds = [0, 1, 2] beside it, or --seeds 3")
        if key == f"{STRATEGY}.name":
            raise ConfigError(f"{key!r} is no axis: sweep over 'strategy', which makes the labels")
        if key.split(".")[0] in FORBIDDEN:
            raise ConfigError(f"{key!r} changes no result, so nothing can be swept over it")
    _check_order(sweep)


def _check_order(sweep: Sweep) -> None:
    """Refuse an axis that a later one would replace, as ``clients`` does ``clients.count``."""
    keys = [key for key in sweep.axes() if key != STRATEGY or STRATEGY in sweep.zip]
    for index, key in enumerate(keys):
        later = next((k for k in keys[index + 1 :] if key.startswith(f"{k}.")), None)
        if later is not None:
            raise ConfigError(
                f"{later!r} comes after {key!r} and would replace it; name {later!r} first"
            )


def named(value: Any) -> str:
    """Return a value as tables and figures name it.

    >>> named(0.05), named("fedavg"), named({"name": "fedd2s", "drop_every": 5}), named([1, 2])
    ('0.05', 'fedavg', 'fedd2s drop_every=5', '1,2')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return ",".join(named(v) for v in value)
    if isinstance(value, Mapping):
        rest = [f"{k}={named(v)}" for k, v in value.items() if k != "name"]
        return " ".join([str(value.get("name", "")), *rest]).strip()
    return str(value)
