"""Operations of one process, timed in turn: the bench of what is no round of averaging."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkd.bench.contest import Options, take
from fedkd.bench.passes import Say, measure
from fedkd.bench.process import Child
from fedkd.bench.readings import Machine
from fedkd.bench.registries import operations
from fedkd.bench.results import Entry, Outcome
from fedkd.errors import FedkdError


@dataclass
class Operation:
    """One operation of a process, for passes."""

    label: str
    child: Child
    least: float

    @property
    def pid(self) -> int:
        """The process of all operations of a kind."""
        return self.child.pid

    def sample(self, pass_: int) -> float:
        """Do it for a while and return the seconds of one."""
        said = self.child.ask("time", name=self.label, least=self.least)
        return float(said["seconds"]) / int(said["repeats"])


def run_operations(
    name: str,
    given: dict[str, Any],
    folder: Path,
    options: Options,
    machine: Machine,
    say: Say,
    start: Callable[[Path], Child] = Child,
) -> Outcome:
    """Time all operations of a kind in one process, pass by pass.

    What goes wrong before anything is timed, a missing data set for instance, is told by a single
    entry that failed.
    """
    kind = operations.get(name)
    folder.mkdir(parents=True, exist_ok=True)
    outcome = Outcome(name, kind.unit, kind.reference, {"title": kind.title}, [])
    with ExitStack() as open_:
        child = start(folder / f"{name}.log")
        open_.callback(child.kill)
        try:
            said = child.ask("operations", name=name, options=given)
        except FedkdError as error:
            say(f"{name}: {error}")
            outcome.entries.append(Entry(name, status="failed", problem=str(error)))
            return outcome
        values = said["facts"].pop("values", {})
        outcome.facts |= said["facts"]
        outcome.entries = [Entry(n, values=values.get(n, {})) for n in said["names"]]
        timed = [Operation(n, child, options.least) for n in said["names"] if kind.timed]
        say(f"{name}: ready")
        if not timed:
            return outcome
        found = measure(timed, options.passes, machine, say, tries=options.tries)
        for entry in outcome.entries:
            take(entry, found[entry.label])
    return outcome
