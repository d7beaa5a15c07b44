"""Alternating passes: every contender once, in turn, again and again; loaded samples are dropped.

Machines drift (heat, neighbours, caches), so two contenders are only compared within a pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedkd.bench.readings import Load, Machine
from fedkd.errors import FedkdError

LIMIT, TRIES, PAUSE = 0.10, 3, 0.3
Say = Callable[[str], None]


class Contender(Protocol):
    """What can be timed."""

    @property
    def label(self) -> str:
        """Its name in tables."""

    @property
    def pid(self) -> int:
        """Its process; that, and all below it, is its own."""

    def sample(self, pass_: int) -> float:
        """Do the work of a pass and return the seconds of one unit of it."""


@dataclass(frozen=True)
class Sample:
    """One attempt: seconds a unit, and what else the machine did meanwhile (None: not known)."""

    seconds: float
    load: Load | None = None

    @property
    def taken(self) -> float:
        """The share of CPU time that others had; 0 where it is not known."""
        return self.load.total if self.load else 0.0


@dataclass
class Series:
    """The samples of one contender, by pass the quietest of its attempts.

    ``problem`` says what ended it before the last pass.
    """

    label: str
    attempts: int = 0
    dropped: int = 0
    quietest: list[Sample] = field(default_factory=list)
    problem: str = ""

    def add(self, tried: Sequence[Sample]) -> None:
        """Take the attempts of a pass."""
        self.attempts += len(tried)
        self.dropped += sum(sample.taken > LIMIT for sample in tried)
        self.quietest.append(min(tried, key=lambda sample: sample.taken))

    @property
    def noisy(self) -> bool:
        """Whether more than half of all attempts were under load."""
        return self.dropped > self.attempts / 2

    @property
    def seconds(self) -> list[float | None]:
        """Seconds by pass; None where no quiet sample could be had, unless the whole is noisy."""
        return [s.seconds if self.noisy or s.taken <= LIMIT else None for s in self.quietest]

    @property
    def cores(self) -> list[float]:
        """How many cores it kept busy, by pass."""
        return [s.load.cores for s in self.quietest if s.load]


def measure(
    contenders: Sequence[Contender],
    passes: int,
    machine: Machine,
    say: Say = lambda line: None,
    *,
    tries: int = TRIES,
    pause: Callable[[float], None] = time.sleep,
) -> dict[str, Series]:
    """Sample all contenders in turn, ``passes`` times; return their series by label.

    A sample during which others had more than a tenth of the CPU time is dropped and taken again,
    ``tries`` times at most.
    """
    found = {c.label: Series(c.label) for c in contenders}
    for pass_ in range(passes):
        for contender in contenders:
            series = found[contender.label]
            if series.problem:
                continue
            try:
                series.add(_quiet(contender, pass_, machine, tries, pause))
            except FedkdError as error:
                series.problem = str(error)
        last = {n: s.quietest[-1].seconds for n, s in found.items() if s.quietest}
        said = ", ".join(f"{n} {seconds:.3g} s" for n, seconds in last.items())
        say(f"pass {pass_ + 1}/{passes}: {said}")
    return found


def _quiet(
    contender: Contender, pass_: int, machine: Machine, tries: int, pause: Callable[[float], None]
) -> list[Sample]:
    """Return the attempts of a pass, the last one quiet if any is."""
    tried: list[Sample] = []
    while len(tried) < tries and (not tried or tried[-1].taken > LIMIT):
        if tried:
            pause(PAUSE)
        before = machine.read(contender.pid)
        seconds = contender.sample(pass_)
        tried.append(Sample(seconds, machine.load(before, machine.read(contender.pid))))
    return tried
