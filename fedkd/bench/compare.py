"""Two results side by side: did a contender become faster, by its ratio to the reference, or not.

Only results of one work can be compared; seconds of two sessions cannot be, and are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedkd.bench.results import Outcome, Ratio, Result
from fedkd.bench.tables import Row, table
from fedkd.errors import ConfigError


@dataclass(frozen=True)
class Change:
    """The ratio of one contender to the reference, before and after."""

    work: str
    label: str
    before: Ratio
    after: Ratio

    @property
    def factor(self) -> float:
        """How much of the time is left; below 1 is faster."""
        return self.after.median / self.before.median

    @property
    def clear(self) -> bool:
        """Whether the ranges over passes do not even touch."""
        return self.after.high < self.before.low or self.after.low > self.before.high


def changes(before: Result, after: Result) -> list[Change]:
    """Return what changed in works and contenders that both results have.

    Raises:
        ConfigError: a work differs, or nothing is in both.
    """
    found = [
        change
        for one in before.outcomes
        for other in [after.outcome(one.name)]
        if other is not None
        for change in _changed(one, other)
    ]
    if not found:
        raise ConfigError(
            "the two results have no timed contender of one work in common: "
            f"{_listed(before)} there, {_listed(after)} here"
        )
    return found


def _changed(one: Outcome, other: Outcome) -> Iterator[Change]:
    here, there = one.facts.get("hash"), other.facts.get("hash")
    if here != there:
        raise ConfigError(
            f"{one.name}: the work has the hash {here} in the first result and {there} in the "
            "second, so their figures cannot be compared; run both with the same options"
        )
    if one.reference != other.reference:
        raise ConfigError(
            f"{one.name}: ratios are to {one.reference!r} in the first result and to "
            f"{other.reference!r} in the second; run both with the same reference"
        )
    for entry in one.entries:
        before, after = one.ratio(entry.label), other.ratio(entry.label)
        if before is not None and after is not None and entry.label != one.reference:
            yield Change(one.name, entry.label, before, after)


def _listed(result: Result) -> str:
    return ", ".join(o.name for o in result.outcomes) or "nothing"


def markdown(found: list[Change]) -> str:
    """Return the changes as a table."""

    def rows() -> Iterator[Row]:
        for c in found:
            said = "" if not c.clear else "faster" if c.factor < 1 else "slower"
            yield c.work, c.label, str(c.before), str(c.after), f"{c.factor:.3g}", said

    head = ("work", "contender", "ratio before", "ratio after", "after / before", "beyond ranges")
    return "\n".join(table(head, rows())) + "\n"
