"""Where else a run's values go: what a sink is told, and the registry of sinks.

``metrics.jsonl`` is always written and is what results are made of. A sink gets a copy of its
values by round, for those who watch runs in TensorBoard, MLflow or W&B; nothing is read back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from fedkd.axes import named
from fedkd.errors import ConfigError
from fedkd.registry import Registry
from fedkd.types import Metrics, Record

Setting = str | int | float | bool
BINS = "bin_"
"""What begins so is of the last round alone: values for a diagram, not for a curve."""

sinks: Registry[type[Sink]] = Registry("sink", "fedkd.engine.sinks", "sinks")
"""Sinks by name; a drop-in imports this and :class:`Sink` and stands in ``sinks/NAME.py``."""


@dataclass(frozen=True)
class Start:
    """What a sink is told of a run.

    ``settings`` is the experiment as one flat table. ``first_round`` is the first round whose
    values follow, 0 for a new run: later ones that a sink has already are of before a resume.
    ``memory`` is what this sink put into it when the run began, and {} before.
    """

    name: str
    title: str
    digest: str
    settings: Mapping[str, Setting]
    headline: str
    folder: Path
    home: Path
    first_round: int
    memory: dict[str, str]


class Sink(ABC):
    """A place that values of a run are copied to.

    Whatever it raises is noted in ``events.log`` and ends the copying, never the run.
    """

    extra: ClassVar[str] = ""
    """The extra of fedkd that installs what it needs."""

    @classmethod
    def modules(cls) -> tuple[str, ...]:
        """Return the names of the packages that have to be installed."""
        return ()

    @classmethod
    def missing(cls) -> str:
        """Return why this sink cannot be used here and what to do about it, or an empty string."""
        lacking = [module for module in cls.modules() if find_spec(module) is None]
        if not lacking:
            return ""
        fix = f"pip install 'fedkd[{cls.extra}]'" if cls.extra else "install it"
        return f"needs {' and '.join(lacking)}, which is not installed: {fix}"

    @abstractmethod
    def start(self, start: Start) -> str:
        """Open it and return where the values can be seen."""

    @abstractmethod
    def write(self, round_: int, values: Metrics) -> None:
        """Take the values of one round; the same round may come more than once."""

    @abstractmethod
    def finish(self, final: Metrics | None) -> None:
        """Close it; ``final`` is the headline result, None where the run was broken off."""


def check(names: Iterable[str]) -> None:
    """Refuse sinks that cannot be used, before the first round.

    Raises:
        ConfigError: a sink does not exist, or what it needs is not installed.
    """
    for name in names:
        missing = sinks.get(name).missing()
        if missing:
            raise ConfigError(f"engine.sinks: {name} {missing}; or leave it out of engine.sinks")


def flat(table: Mapping[str, Any], above: str = "") -> dict[str, Setting]:
    """Return nested tables as one, its keys joined by dots.

    >>> flat({"strategy": {"name": "fedavg"}, "seeds": [0, 1], "rounds": 3})
    {'strategy.name': 'fedavg', 'seeds': '0,1', 'rounds': 3}
    """
    found: dict[str, Setting] = {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{above}{key}.")
        else:
            found[above + key] = (
                value if isinstance(value, str | int | float | bool) else named(value)
            )
    return found


def values(records: Iterable[Record]) -> dict[int, Metrics]:
    """Return by round what sinks are given: the federation's values, else the mean over clients.

    Names are read-out, predictor, split and metric: ``composite/personal/test/accuracy``,
    ``train/bytes_up``. The mean is over the clients that have a value, each counted once. Bins of
    confidence are left out: a curve of a single value each says nothing.

    >>> values([Record(round=1, metric="loss", value=v, client=k) for k, v in enumerate([1, 3])])
    {1: {'loss': 2.0}}
    """
    of_clients: dict[tuple[int, str], list[float]] = {}
    found: dict[int, Metrics] = {}
    for r in records:
        if r.metric.startswith(BINS):
            continue
        name = "/".join(part for part in (r.readout, r.predict, r.split, r.metric) if part)
        if r.client >= 0:
            of_clients.setdefault((r.round, name), []).append(r.value)
        else:
            found.setdefault(r.round, {})[name] = float(r.value)
    for (round_, name), each in of_clients.items():
        found.setdefault(round_, {}).setdefault(name, sum(each) / len(each))
    return dict(sorted(found.items()))


def final(summary: Mapping[str, Any]) -> Metrics:
    """Return the numbers of a summary's headline, such as ``final/user_accuracy``."""
    headline = summary["headline"]
    entry = summary["readouts"].get(headline["readout"], {}).get(headline["predict"], {})
    mean = entry.get("mean_last_k", {})
    return {f"final/{key}": float(v) for key, v in mean.items() if isinstance(v, int | float)}
