"""The live table of a sweep: labels by points, a mark for every seed, and the time that is left.

Where the table does not fit, or nobody looks (a pipe, a log), there is a line for every run.
"""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedkd.axes import named
from fedkd.cli.progress import clock, plural
from fedkd.sweep.plan import PlannedRun
from fedkd.sweep.trials import Trial
from fedkd.sweep.worker import Told

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

MARKS = {"waiting": "·", "running": "▸", "done": "✓", "failed": "✗"}
FRAME = 6
"""Lines of the live table beside those of labels and of runs under way."""
State = Literal["waiting", "running", "done", "failed"]


@dataclass
class Standing:
    """Where one run is; ``began`` is the clock when it was first heard of in this session."""

    state: State = "waiting"
    round: int = 0
    first: int = 0
    rounds: int = 1
    accuracy: float = math.nan
    began: float = math.nan
    ended: float = math.nan
    failures: int = 0


class Board:
    """Knows where every run of a sweep stands, and how long the rest will take."""

    def __init__(self, jobs: int, now: Callable[[], float] = time.monotonic) -> None:
        self.jobs, self.now = jobs, now
        self.runs: list[PlannedRun] = []
        self.standing: dict[str, Standing] = {}
        self._each: dict[str, PlannedRun] = {}
        self.checked = (0, 0)

    def planned(self, runs: Sequence[PlannedRun], finished: Sequence[str]) -> None:
        """Take note of all runs, and of those that were finished before."""
        self.runs, self.standing = list(runs), {}
        self._each = {run.digest: run for run in runs}
        done = set(finished)
        for digest, run in self._each.items():
            state: State = "done" if digest in done else "waiting"
            self.standing[digest] = Standing(state, rounds=run.experiment.rounds)

    def told(self, run: PlannedRun, told: Told) -> None:
        """Take note of a round, a result or a failure."""
        kind, what = told
        at = self.standing[run.digest]
        if math.isnan(at.began):
            at.began, at.first = self.now(), int(what.get("round", 0))
        if kind == "round":
            at.state, at.round = "running", int(what["round"])
            at.failures += len(what["failures"])
        else:
            at.state, at.ended = ("done" if kind == "done" else "failed"), self.now()
        at.accuracy = float(what.get("accuracy", at.accuracy))

    def count(self, state: State) -> int:
        """Return how many runs are in a state."""
        return sum(s.state == state for s in self.standing.values())

    def left(self) -> float:
        """Return the seconds that are left, NaN until something is known.

        A round costs about as much as its cohort, on top of what every round costs; the pace is
        that of the same label where one of its rounds was seen, else that of all.
        """
        spent: dict[str, float] = {}
        worked: dict[str, float] = {}
        for digest, at in self.standing.items():
            rounds = (at.rounds if at.state == "done" else at.round) - at.first
            if math.isnan(at.began) or rounds <= 0:
                continue
            end = self.now() if math.isnan(at.ended) else at.ended
            label = self._each[digest].label
            spent[label] = spent.get(label, 0.0) + end - at.began
            worked[label] = worked.get(label, 0.0) + rounds * self._cost(digest)
        if not spent:
            return math.nan
        overall = sum(spent.values()) / sum(worked.values())
        rest = 0.0
        for digest, at in self.standing.items():
            if at.state in ("waiting", "running"):
                label = self._each[digest].label
                pace = spent[label] / worked[label] if label in spent else overall
                rest += (at.rounds - at.round) * self._cost(digest) * pace
        open_ = self.count("waiting") + self.count("running")
        return rest / max(1, min(self.jobs, open_))

    def _cost(self, digest: str) -> float:
        clients = self._each[digest].experiment.clients
        share = 1.0 if clients.participation.scheme == "full" else clients.participation.ratio
        return 1.0 + share * clients.count

    def line(self) -> str:
        """Return the state of the sweep in one line."""
        if not self.runs:
            return f"checking {self.checked[0] + 1} of {self.checked[1]} labels and points"
        parts = [f"{self.count('done')}/{len(self.standing)} runs finished"]
        if self.count("failed"):
            parts.append(f"{self.count('failed')} failed")
        failures = sum(s.failures for s in self.standing.values())
        if failures:
            parts.append(plural(failures, "client failure"))
        left = self.left()
        if not math.isnan(left) and self.count("waiting") + self.count("running"):
            parts.append(f"{clock(left)} left")
        return ", ".join(parts)


class SweepLines:
    """One plain line for every run that ends, for logs and pipes."""

    def __init__(self, board: Board) -> None:
        self.board = board

    def checking(self, done: int, of: int) -> None:
        """Say that everything is checked first, which can take a while."""
        self.board.checked = done, of
        if not done:
            self._write(f"checking what is to be run at {plural(of, 'point')} of all labels")

    def planned(self, runs: Sequence[PlannedRun], finished: Sequence[str]) -> None:
        """Say how much there is to do."""
        self.board.planned(runs, finished)
        count = len(self.board.standing)
        self._write(f"{plural(count, 'run')}, {len(finished)} finished before")

    def told(self, run: PlannedRun, told: Told) -> None:
        """Write a line for a run that has ended."""
        self.board.told(run, told)
        if told[0] != "round":
            self._write(f"{ended(run, told)}; {self.board.line()}")

    def trial_finished(self, label: str, trial: Trial, number: int, trials: int) -> None:
        """Write a line for a trial of tuning."""
        options = ", ".join(f"{k.rsplit('.', 1)[-1]}={named(v)}" for k, v in trial.options.items())
        worth = (
            trial.error
            if trial.validation is None
            else f"validation {100 * trial.validation:.1f} %"
        )
        self.note(f"tuning {label}, trial {number}/{trials}: {options}: {worth}")

    def note(self, text: str) -> None:
        """Write a line."""
        self._write(text)

    def end(self) -> None:
        """Leave everything as it is."""

    def _write(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class SweepSilent(SweepLines):
    """Shows nothing."""

    def _write(self, line: str) -> None:
        return


class SweepTable(SweepLines):
    """The live table on a terminal, with what stays printed above it."""

    def __init__(self, board: Board, console: Console) -> None:
        super().__init__(board)
        from rich.live import Live

        self.console = console
        # Live draws in a thread of its own: it must not see a plan half made.
        self._busy = threading.Lock()
        # Drawing takes time that the runs should have.
        self.live = Live(
            console=console, refresh_per_second=2, transient=True, get_renderable=self._draw
        )

    def checking(self, done: int, of: int) -> None:
        """Show how many labels and points have been checked."""
        self.board.checked = done, of
        self.live.start()

    def planned(self, runs: Sequence[PlannedRun], finished: Sequence[str]) -> None:
        """Draw the table."""
        with self._busy:
            self.board.planned(runs, finished)
        self.live.start()

    def told(self, run: PlannedRun, told: Told) -> None:
        """Take note; failures stay on the screen."""
        with self._busy:
            self.board.told(run, told)
        if told[0] == "failed":
            self.note(ended(run, told))

    def note(self, text: str) -> None:
        """Print a message above the table."""
        self.console.print(text, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Remove the table."""
        self.live.stop()

    def _draw(self) -> RenderableType:
        with self._busy:
            return self._drawn()

    def _drawn(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        under_way = {
            run.digest: f"  {MARKS['running']} {self._progress(run)}"
            for run in self.board.runs
            if self.board.standing[run.digest].state == "running"
        }
        running = [Text(line, no_wrap=True, overflow="ellipsis") for line in under_way.values()]
        parts: list[RenderableType] = []
        labels = len({run.label for run in self.board.runs})
        # What does not fit is cut off at the bottom, where the time that is left stands.
        if labels and labels + len(running) + FRAME <= self.console.height:
            parts.append(grid(self.board, self.console.width))
        return Group(*parts, *running, Text(f"  {self.board.line()}", style="bold"))

    def _progress(self, run: PlannedRun) -> str:
        at = self.board.standing[run.digest]
        judged = "" if math.isnan(at.accuracy) else f", {100 * at.accuracy:.1f} %"
        # First what changes: a long label is cut off.
        return f"round {at.round}/{at.rounds}{judged}: {run.title}"


def grid(board: Board, width: int) -> RenderableType:
    """Return labels by points with a mark for every seed; by label alone where that is too wide."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    labels = list(dict.fromkeys(run.label for run in board.runs))
    places = list(dict.fromkeys(_place(run) for run in board.runs))
    seeds = len({run.seed for run in board.runs})
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    column = max([seeds, *(len(place) for place in places)]) + 2
    if max(map(len, labels)) + column * len(places) + 2 > width:
        places = []
        table.add_column("finished", justify="right")
    for place in places:
        table.add_column(Text(place), no_wrap=True)
    for label in labels:
        mine = [run for run in board.runs if run.label == label]
        if places:
            cells = [_marks(board, [r for r in mine if _place(r) == place]) for place in places]
        else:
            done = sum(board.standing[r.digest].state == "done" for r in mine)
            cells = [Text(f"{done}/{len(mine)}")]
        table.add_row(Text(label), *cells)
    return table


def _marks(board: Board, runs: Sequence[PlannedRun]) -> Text:
    from rich.text import Text

    styles = {"failed": "red", "running": "bold", "done": "green", "waiting": "dim"}
    text = Text()
    for run in runs:
        state = board.standing[run.digest].state
        text.append(MARKS[state], style=styles[state])
    return text


def _place(run: PlannedRun) -> str:
    return " ".join(named(value) for value in run.point.values()) or "runs"


def ended(run: PlannedRun, told: Told) -> str:
    """Say what a run came to."""
    kind, what = told
    if kind == "failed":
        return f"failed: {run.title}: {what['error']}"
    accuracy = float(what["accuracy"])
    return run.title if math.isnan(accuracy) else f"{run.title}: {100 * accuracy:.1f} %"
