"""What a search may try: lists of values and ranges, which are counted where they can be.

A range of whole numbers, or with a step, is a list that nobody has to write; only real ranges have
no end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Protocol

from pydantic import Field, StrictFloat, StrictInt

from fedkd.axes import Space, Table
from fedkd.errors import ConfigError
from fedkd.options import build, options

Number = StrictInt | StrictFloat
DIGITS = 4
"""Significant digits of a number from a real range: more would be neither read nor meant."""


class Dimension(Protocol):
    """One key of a space; ``count`` values in order, None of a real range."""

    @property
    def key(self) -> str:
        """The key of an experiment."""
        ...

    @property
    def count(self) -> int | None:
        """How many values there are."""
        ...

    def nth(self, index: int) -> Any:
        """Return a value by its place; a real range has two, its ends."""
        ...

    def samples(self) -> Sequence[Any]:
        """Return all that may be wrong: every value of a list, the ends of a range."""
        ...

    def distribution(self) -> Any:
        """Return what Optuna draws from."""
        ...

    def value(self, drawn: Any) -> Any:
        """Return the value that Optuna's draw stands for."""
        ...


@dataclass(frozen=True)
class Choice:
    """Values without an order: strings, switches, numbers, lists."""

    key: str
    values: tuple[Any, ...]

    @property
    def count(self) -> int:
        return len(self.values)

    def nth(self, index: int) -> Any:
        return self.values[index]

    def samples(self) -> Sequence[Any]:
        return self.values

    def distribution(self) -> Any:
        from optuna.distributions import CategoricalDistribution

        # Places in place of values: Optuna knows no lists, and takes 1 and true for the same.
        return CategoricalDistribution(range(self.count))

    def value(self, drawn: Any) -> Any:
        return self.values[drawn]


@dataclass(frozen=True)
class Steps:
    """``low, low + step, ...``, without the rounding of repeated sums."""

    key: str
    low: int | float
    step: int | float
    count: int

    def nth(self, index: int) -> Any:
        if isinstance(self.low, int) and isinstance(self.step, int):
            return self.low + index * self.step
        return float(Decimal(str(self.low)) + index * Decimal(str(self.step)))

    def samples(self) -> Sequence[Any]:
        return self.nth(0), self.nth(self.count - 1)

    def distribution(self) -> Any:
        from optuna.distributions import IntDistribution

        return IntDistribution(0, self.count - 1)

    def value(self, drawn: Any) -> Any:
        return self.nth(drawn)


@dataclass(frozen=True)
class Magnitudes:
    """Whole numbers from low to high, as many between 1 and 10 as between 10 and 100."""

    key: str
    low: int
    high: int

    @property
    def count(self) -> int:
        return self.high - self.low + 1

    def nth(self, index: int) -> int:
        return self.low + index

    def samples(self) -> Sequence[Any]:
        return self.low, self.high

    def distribution(self) -> Any:
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=True)

    def value(self, drawn: Any) -> int:
        return int(drawn)


@dataclass(frozen=True)
class Between:
    """Real numbers from low to high."""

    key: str
    low: float
    high: float
    log: bool

    @property
    def count(self) -> None:
        return None

    def nth(self, index: int) -> float:
        return (self.low, self.high)[index]

    def samples(self) -> Sequence[Any]:
        return self.low, self.high

    def distribution(self) -> Any:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log)

    def value(self, drawn: Any) -> float:
        return min(max(float(f"{drawn:.{DIGITS}g}"), self.low), self.high)


@options
class Range:
    """A range of numbers; whole ones if low and high are."""

    low: Annotated[Number, Field(description="the smallest value")]
    high: Annotated[Number, Field(description="the largest value")]
    log: Annotated[bool, Field(description="as many values below the geometric mean as above")] = (
        False
    )
    step: Annotated[Number | None, Field(description="distance of neighbouring values")] = None


def dimensions(space: Space, where: str) -> list[Dimension]:
    """Return the keys of a space with what they may be.

    Raises:
        ConfigError: neither a list nor a range, or a list or range without two values.
    """
    return [_dimension(key, entry, f"{where}.{key}") for key, entry in space.items()]


def _dimension(key: str, entry: Any, where: str) -> Dimension:
    if isinstance(entry, Mapping):
        return _range(key, build(Range, entry, where), where)
    if not isinstance(entry, list | tuple):
        raise ConfigError(
            f"{where} = {entry!r}: give a list of values, or a table as in {{ low = 0.01, "
            "high = 1.0, log = true }"
        )
    if len(entry) < 2:
        raise ConfigError(f"{where} = {list(entry)!r}: one value needs no search; give two or more")
    texts = [json.dumps(value, sort_keys=True, default=str) for value in entry]
    if len(set(texts)) < len(texts):
        raise ConfigError(f"{where} = {list(entry)!r} names a value twice")
    return Choice(key, tuple(entry))


def _range(key: str, given: Range, where: str) -> Dimension:
    low, high, step = given.low, given.high, given.step
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"{where}: low = {low!r} must be below high = {high!r}, both finite")
    if given.log and (low <= 0 or step is not None):
        raise ConfigError(f"{where}: log = true needs low > 0 (it is {low!r}) and takes no step")
    whole = isinstance(low, int) and isinstance(high, int)
    if step is None and not whole:
        return Between(key, float(low), float(high), given.log)
    if given.log and isinstance(low, int) and isinstance(high, int):
        return Magnitudes(key, low, high)
    step = 1 if step is None else step
    if not (math.isfinite(step) and 0 < step <= high - low):
        raise ConfigError(f"{where}: step = {step!r} must be above 0 and at most high - low")
    count = int((Decimal(str(high)) - Decimal(str(low))) // Decimal(str(step))) + 1
    return Steps(key, low, step, count)


def size(space: Sequence[Dimension]) -> int | None:
    """Return the number of combinations; None where a range is real.

    >>> size([Choice("a", (1, 2)), Steps("b", 0, 1, 3)])
    6
    """
    total = 1
    for dimension in space:
        if dimension.count is None:
            return None
        total *= dimension.count
    return total


def combination(space: Sequence[Dimension], index: int) -> Table:
    """Return one of the combinations by its number; the last key changes fastest.

    >>> combination([Choice("a", (True, False)), Steps("b", 0.1, 0.1, 3)], 5)
    {'a': False, 'b': 0.3}
    """
    places = []
    for dimension in reversed(space):
        index, place = divmod(index, dimension.count or 1)
        places.append(place)
    return {d.key: d.nth(p) for d, p in zip(space, reversed(places), strict=True)}
