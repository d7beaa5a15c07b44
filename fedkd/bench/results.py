"""What a bench found, as one JSON file; nothing in it names a machine or a folder."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedkd.errors import ConfigError

SCHEMA = 1
Status = Literal["ok", "noisy", "skipped", "wrong", "failed"]


@dataclass(frozen=True)
class Ratio:
    """The median over passes of a ratio, its range, and how many passes there were."""

    median: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g}, n={self.n})"


@dataclass
class Entry:
    """One contender on one work.

    ``seconds`` are those of one unit, by pass, None where a sample was dropped; ``start_up`` (from
    the command to being ready), ``first`` and ``shutdown`` are of processes that ran alone.
    ``problem`` says why it was skipped, or what is wrong with it.
    """

    label: str
    backend: str = ""
    threads: int = 1
    workers: int = 1
    external: bool = False
    status: Status = "ok"
    problem: str = ""
    hash: str = ""
    samples: int = 0
    apart_fp64: float | None = None
    apart_fp32: float | None = None
    seconds: list[float | None] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    attempts: int = 0
    dropped: int = 0
    start_up: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    shutdown: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    values: dict[str, float] = field(default_factory=dict)

    @property
    def timed(self) -> bool:
        """Whether there is a figure to show."""
        return self.status in ("ok", "noisy") and any(s is not None for s in self.seconds)

    @property
    def median(self) -> float:
        """The median of the seconds of one unit; NaN without a sample."""
        known = [s for s in self.seconds if s is not None]
        return statistics.median(known) if known else math.nan


@dataclass
class Outcome:
    """One work with all its contenders; ``reference`` is what ratios are to."""

    name: str
    unit: str
    reference: str
    facts: dict[str, Any]
    entries: list[Entry]

    def entry(self, label: str) -> Entry | None:
        """Return a contender."""
        return next((e for e in self.entries if e.label == label), None)

    def ratio(self, label: str, against: str | None = None) -> Ratio | None:
        """Return how long a contender takes for each second of another, pass by pass."""
        one, other = self.entry(label), self.entry(against or self.reference)
        if one is None or other is None or not (one.timed and other.timed):
            return None
        return ratio(one.seconds, other.seconds)


def ratio(a: Sequence[float | None], b: Sequence[float | None]) -> Ratio | None:
    """Return the median of ``a / b`` over the passes that both have; None where there is none.

    >>> print(ratio([1.0, 2.0, None], [2.0, 2.0, 1.0]))
    0.75 (0.5 to 1, n=2)
    """
    each = [x / y for x, y in zip(a, b, strict=False) if x is not None and y]
    return Ratio(statistics.median(each), min(each), max(each), len(each)) if each else None


@dataclass
class Result:
    """A whole bench."""

    machine: dict[str, Any]
    versions: dict[str, str]
    passes: int
    outcomes: list[Outcome]
    goals: list[dict[str, Any]] = field(default_factory=list)
    schema: int = SCHEMA

    def outcome(self, name: str) -> Outcome | None:
        """Return the work of a name."""
        return next((o for o in self.outcomes if o.name == name), None)

    @property
    def wrong(self) -> list[Entry]:
        """The contenders that do other work, or broke down."""
        return [e for o in self.outcomes for e in o.entries if e.status in ("wrong", "failed")]

    def text(self) -> str:
        """Return it as JSON."""
        table = dataclasses.asdict(self)
        for outcome, made in zip(self.outcomes, table["outcomes"], strict=True):
            for entry, row in zip(outcome.entries, made["entries"], strict=True):
                found = outcome.ratio(entry.label)
                row["ratio"] = None if found is None else dataclasses.asdict(found)
        return json.dumps(_finite(table), indent=1, allow_nan=False) + "\n"


def read(file: Path) -> Result:
    """Read a result.

    Raises:
        ConfigError: there is none, or it is of another fedkd's format.
    """
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        if table.get("schema") != SCHEMA:
            raise ConfigError(
                f"{file} has format {table.get('schema')}, this fedkd reads {SCHEMA}; run it again"
            )
        outcomes = []
        for made in table.pop("outcomes"):
            rows = [{k: v for k, v in row.items() if k != "ratio"} for row in made.pop("entries")]
            outcomes.append(Outcome(**made, entries=[Entry(**row) for row in rows]))
        return Result(**table, outcomes=outcomes)
    except FileNotFoundError:
        raise ConfigError(f"there is no file {file}; make one by fedkd bench run") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is no result of fedkd bench run: {error}") from None


def _finite(value: Any) -> Any:
    """Return tables with None for what JSON cannot say: infinitely far, not a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
