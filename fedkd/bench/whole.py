"""A whole process from the command to its end: what a short experiment costs, start-up and all."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter

from fedkd.bench.contest import Contest, Contestant
from fedkd.bench.passes import measure
from fedkd.bench.results import Outcome
from fedkd.errors import RunError

ROUNDS = 12


@dataclass
class WholeProcess:
    """A contender that is started, plays its rounds and ends in every sample."""

    contest: Contest
    contestant: Contestant

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.contestant.label

    @property
    def pid(self) -> int:
        """Our own process: those of the samples are below it, and gone when they are over."""
        return os.getpid()

    def sample(self, pass_: int) -> float:
        """Return the seconds from the start of the process to its end."""
        with ExitStack() as open_:
            start = perf_counter()
            child = self.contest.child(f"whole-{self.label}", open_)
            if not self.contest.begin(child, self.contestant, "float32"):
                raise RunError(self.contest.entries[self.label].problem)
            child.ask("rounds", first=1, count=ROUNDS)
            child.close()
            return perf_counter() - start


def run_whole(contest: Contest) -> Outcome:
    """Time whole processes of :data:`ROUNDS` rounds; the gate comes first, as always."""
    facts = contest.prepare()
    timed = [WholeProcess(contest, contestant) for contestant in contest.able()]
    options = contest.options
    contest.keep(measure(timed, options.passes, contest.machine, contest.say, tries=options.tries))
    return contest.outcome(f"whole {contest.plan.name}", f"process of {ROUNDS} rounds", facts)
