"""Live progress: one bar for a whole comparison on a terminal, one line a round elsewhere.

The tracker knows where the comparison stands, also when nothing is shown, because the message
after Ctrl-C has to say so; a view only draws it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fedkd.config import Cell, Experiment
from fedkd.engine.study import CellResult
from fedkd.metrics.log import Log

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_FAILURES = 3


@dataclass
class Standing:
    """Where a comparison is: run k of n, round t of R, and what it has come to so far.

    ``accuracy`` is the headline user accuracy of the last judged round, ``bits`` of text the bits
    per character (NaN of anything else), ``bytes`` what was sent both ways in this run's training,
    ``failures`` the client failures of the whole comparison, ``left`` the seconds that are left,
    NaN where that is not known yet.
    """

    runs: int = 0
    run: int = 0
    label: str = ""
    seed: int = 0
    round: int = 0
    rounds: int = 0
    all_rounds: int = 0
    done_rounds: int = 0
    accuracy: float = math.nan
    bits: float = math.nan
    bytes: float = 0.0
    failures: int = 0
    left: float = math.nan

    @property
    def title(self) -> str:
        """Label and seed of the run."""
        return f"{self.label}, seed {self.seed}"

    def line(self) -> str:
        """Return the state of the run in one line."""
        parts = [f"round {self.round}/{self.rounds}"]
        if not math.isnan(self.accuracy):
            parts.append(f"accuracy {100 * self.accuracy:.1f} %")
        if not math.isnan(self.bits):
            parts.append(f"{self.bits:.2f} bits/character")
        parts.append(size(self.bytes))
        if self.failures:
            parts.append(plural(self.failures, "client failure"))
        if not math.isnan(self.left):
            parts.append(f"{clock(self.left)} left")
        return "  ".join(parts)


class View(Protocol):
    """Draws a standing."""

    def begin(self, standing: Standing) -> None:
        """Begin, once all runs are known."""

    def update(self, standing: Standing) -> None:
        """Draw a finished round."""

    def note(self, text: str) -> None:
        """Show a message that stays."""

    def end(self) -> None:
        """Leave the terminal as it was."""


class Tracker:
    """Follows a comparison; the watcher of :func:`fedkd.run_study`."""

    def __init__(self, view: View, now: Callable[[], float] = time.monotonic) -> None:
        self.view, self.now = view, now
        self.standing = Standing()
        self.folder: Path | None = None
        self._predict = "personal"
        self._before = self._worked = self._seen = 0
        self._began = 0.0

    def planned(self, cells: Sequence[Cell]) -> None:
        """Take note of all runs before the first."""
        self.standing.runs = len(cells)
        self.standing.all_rounds = sum(c.experiment.rounds for c in cells)
        self._began = self.now()
        self.view.begin(self.standing)

    def cell_started(self, cell: Cell, folder: Path) -> None:
        """Begin a run."""
        s = self.standing
        s.run, s.label, s.seed = s.run + 1, cell.label, cell.seed
        s.round, s.rounds, s.bytes = 0, cell.experiment.rounds, 0.0
        s.accuracy = s.bits = math.nan
        self.folder, self._seen = folder, 0
        # The predictor by which this strategy is compared, as in the run's summary.
        self._predict = cell.experiment.predict

    def started(self, experiment: Experiment, first_round: int) -> None:
        """Begin the rounds of a run; those before ``first_round`` were done earlier."""
        self.standing.round = first_round - 1
        self._advance()
        self.view.update(self.standing)

    def finished_round(self, round_: int, log: Log, failures: Sequence[str]) -> None:
        """Take note of a finished round and of clients that failed in it."""
        self.standing.round = round_
        self.standing.failures += len(failures)
        self._worked += 1
        self._read(log)
        self._advance()
        self._tell(round_, failures)
        self.view.update(self.standing)

    def cell_finished(self, result: CellResult) -> None:
        """Take note of a run's result."""
        s = self.standing
        self._before += s.rounds
        s.done_rounds = self._before
        if result.summary is None:
            self.view.note(f"failed: {s.title}: {result.error}")
        elif s.round == 0:
            self.view.note(f"was finished: {s.title}")

    def _advance(self) -> None:
        s = self.standing
        s.done_rounds = self._before + s.round
        if self._worked:
            pace = (self.now() - self._began) / self._worked
            s.left = pace * (s.all_rounds - s.done_rounds)

    def _read(self, log: Log) -> None:
        """Read the records that are new: all of them would take longer in every round."""
        values: dict[str, dict[int, list[float]]] = {"accuracy": {}, "bits_per_character": {}}
        wanted = ("test", "composite", self._predict)
        for r in log.records[self._seen :]:
            if r.metric in ("bytes_up", "bytes_down") and r.split == "train":
                self.standing.bytes += r.value
            elif r.metric in values and (r.split, r.readout, r.predict) == wanted:
                values[r.metric].setdefault(r.round, []).append(r.value)
        self._seen = len(log.records)
        accuracy, bits = (_last_mean(found) for found in values.values())
        if accuracy is not None:
            self.standing.accuracy = accuracy
        if bits is not None:
            self.standing.bits = bits

    def _tell(self, round_: int, failures: Sequence[str]) -> None:
        for failure in failures[:SHOWN_FAILURES]:
            self.view.note(f"{self.standing.title}: round {round_}: {failure}")
        if len(failures) > SHOWN_FAILURES and self.folder is not None:
            more = len(failures) - SHOWN_FAILURES
            self.view.note(f"  and {more} more, see {self.folder / 'events.log'}")


def _last_mean(values: dict[int, list[float]]) -> float | None:
    """Return the mean of the last round, None without any."""
    if not values:
        return None
    last = values[max(values)]
    return math.fsum(last) / len(last)


class Silent:
    """Shows nothing."""

    def begin(self, standing: Standing) -> None:
        """Show nothing."""

    def update(self, standing: Standing) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""

    def end(self) -> None:
        """Show nothing."""


class Lines:
    """One plain line a round, for logs and pipes."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self.write = write

    def begin(self, standing: Standing) -> None:
        """Say how much there is to do."""
        runs, rounds = plural(standing.runs, "run"), plural(standing.all_rounds, "round")
        self.write(f"{runs}, {rounds} in all")

    def update(self, standing: Standing) -> None:
        """Write a line for a finished round."""
        if standing.round:
            head = f"[{standing.run}/{standing.runs}] {standing.title}"
            self.write(f"{head}  {standing.line()}")

    def note(self, text: str) -> None:
        """Write a line."""
        self.write(text)

    def end(self) -> None:
        """Leave everything as it is."""


class Bar:
    """One bar for the whole comparison, with what stays printed above it."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = console
        self.progress = Progress(
            TextColumn("{task.fields[head]}", markup=False, style="bold"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
            transient=True,
            expand=True,
            # Drawing takes time that the clients of the simulation should have.
            refresh_per_second=4,
        )
        self.task = self.progress.add_task("", total=None, head="preparing", status="")

    def begin(self, standing: Standing) -> None:
        """Draw an empty bar."""
        self.progress.start()
        self.progress.update(self.task, total=standing.all_rounds)

    def update(self, standing: Standing) -> None:
        """Draw the standing."""
        head = f"{standing.run}/{standing.runs} {standing.label}"
        if standing.seed:
            head += f" seed {standing.seed}"
        self.progress.update(
            self.task, completed=standing.done_rounds, head=head, status=standing.line()
        )

    def note(self, text: str) -> None:
        """Print a message above the bar."""
        # Long commands are not broken over lines, so that they can be copied.
        self.progress.console.print(text, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Remove the bar."""
        self.progress.stop()


def size(count: float) -> str:
    """Return bytes as people read them.

    >>> size(0), size(1234), size(56_700_000)
    ('0 B', '1.2 kB', '56.7 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def clock(seconds: float) -> str:
    """Return a duration as hours, minutes and seconds.

    >>> clock(59.6), clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plural(count: int, noun: str) -> str:
    """Return a number with its noun.

    >>> plural(1, "run"), plural(2, "run")
    ('1 run', '2 runs')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"
