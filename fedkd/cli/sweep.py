"""``fedkd sweep``: all labels at all points for all seeds, several at a time, then the report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from fedkd.axes import STRATEGY, Table
from fedkd.cli import INTERRUPTED, complain
from fedkd.cli.places import RUNS, read
from fedkd.cli.run import failures_told_once
from fedkd.cli.screen import screen
from fedkd.cli.sweep_view import Board, SweepLines, SweepSilent, SweepTable
from fedkd.config import Experiment, experiment, parse
from fedkd.engine.folder import write_text
from fedkd.errors import ConfigError
from fedkd.report.full import COMMANDS
from fedkd.sweep.run import SweepResult, run_sweep


def sweep(
    arguments: Sequence[str],
    *,
    over: Sequence[str],
    together: Sequence[str],
    seeds: int | None,
    jobs: int,
    out: Path | None,
    quiet: bool,
    workspace: Path,
) -> int:
    """Run a sweep and report it; return the exit code.

    Raises:
        ConfigError: a run is impossible, found before the first one.
    """
    given = read(arguments, workspace)
    made = with_axes(given, over, together, seeds, workspace)
    place = out or workspace / RUNS / f"{made.name}-sweep"
    board = Board(jobs)
    view = show(board, quiet)
    if not quiet:
        view.note(f"{made.name}: results go to {place}")
        if given.compare and not made.compare:
            left = ", ".join([given.strategy.name, *given.compare])
            view.note(f"strategies are those of the command; the file's are left out: {left}")
    try:
        try:
            with failures_told_once():
                result = run_sweep(made, place, jobs=jobs, watcher=view, workspace=workspace)
        finally:
            view.end()
            if board.runs:
                # What was refused makes none of these results.
                remember(typed(arguments, over, together, seeds, workspace), place)
    except KeyboardInterrupt:
        complain(
            f"stopped; {board.line() if board.runs else 'nothing was run'}. Nothing finished is "
            "lost: go on with the same command"
        )
        return INTERRUPTED
    return finish(result, workspace)


def with_axes(
    made: Experiment,
    over: Sequence[str],
    together: Sequence[str],
    seeds: int | None,
    workspace: Path,
) -> Experiment:
    """Return an experiment with the axes of the command line beside those of its file.

    An axis that is given again replaces that of the file; strategies replace its ``compare``.

    Raises:
        ConfigError: an axis is not ``key=value,value``.
    """
    table = made.table()
    axes: Table = table.setdefault("sweep", {})
    grid, moving = dict(made.sweep.grid), dict(made.sweep.zip)
    for given, target, other, option in (
        (over, grid, moving, "--over"),
        (together, moving, grid, "--zip"),
    ):
        for text in given:
            key, values = axis(text, option)
            other.pop(key, None)
            target[key] = tuple(values)
            if key == STRATEGY:
                table["compare"] = {}
    axes["grid"] = {key: list(values) for key, values in grid.items()}
    axes["zip"] = {key: list(values) for key, values in moving.items()}
    if seeds is not None:
        table["seeds"] = list(range(seeds))
    return experiment(table, workspace=workspace)


def axis(text: str, option: str) -> tuple[str, list[object]]:
    """Read ``key=value,value``.

    >>> axis("clients.participation.ratio=0.1,0.5", "--over")
    ('clients.participation.ratio', [0.1, 0.5])
    """
    key, sign, values = text.partition("=")
    if not sign or not key.strip() or not values.strip():
        raise ConfigError(
            f"{option} {text!r} is no axis; write key=value,value, as in "
            f"{option} clients.participation.ratio=0.1,0.5,1.0"
        )
    parts = [part for part in split(values) if part]
    found = parse(parts[0]) if len(parts) == 1 else [parse(part) for part in parts]
    return key.strip(), found if isinstance(found, list) else [found]


def split(text: str) -> list[str]:
    """Split at commas, those in quotes, brackets and braces aside.

    >>> split('{ name = "fedd2s", drop_every = 5 }, fd, "a, b", [16, 8]')
    ['{ name = "fedd2s", drop_every = 5 }', 'fd', '"a, b"', '[16, 8]']
    """
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not quote and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def show(board: Board, quiet: bool) -> SweepLines:
    """Return how progress is shown: on stderr, so that stdout holds the tables only."""
    if quiet:
        return SweepSilent(board)
    console = screen(err=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return SweepTable(board, console)
    return SweepLines(board)


def typed(
    arguments: Sequence[str],
    over: Sequence[str],
    together: Sequence[str],
    seeds: int | None,
    workspace: Path,
) -> str:
    """Return the command as it could be typed again, without what changes no result.

    >>> typed(["a.toml", "rounds=3"], ["clients.count=5,9"], [], 5, Path("mine"))
    'fedkd sweep a.toml rounds=3 --over clients.count=5,9 --seeds 5 --workspace mine'
    """
    words = ["fedkd", "sweep", *arguments]
    for option, texts in (("--over", over), ("--zip", together)):
        words += [word for text in texts for word in (option, text)]
    words += [] if seeds is None else ["--seeds", str(seeds)]
    return shlex.join([*words, *([] if workspace == Path() else ["--workspace", str(workspace)])])


def remember(line: str, place: Path) -> None:
    """Add a command to the folder's ``commands.txt``, for the report to show."""
    file = place / COMMANDS
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if line not in before.splitlines():
        write_text(file, f"{before}{line}\n")


def finish(result: SweepResult, workspace: Path) -> int:
    """Write and print the report; return 1 if a run failed."""
    from fedkd.report.full import full

    console = screen()
    full([result.folder], result.folder, console=console, workspace=workspace)
    for run in result.failed:
        complain(f"run {run.title} failed: {result.errors[run.digest]}")
    if result.failed:
        console.print("The same command tries what failed again.")
    console.print(f"Results: {result.folder}", soft_wrap=True)
    return 1 if result.failed else 0
