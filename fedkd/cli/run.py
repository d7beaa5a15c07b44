"""``fedkd run``: an experiment with everything it is compared to, watched until it ends."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedkd.axes import Sweep
from fedkd.cli import INTERRUPTED, complain, unexpected
from fedkd.cli.places import config_of, newest, next_free, read, resume_command
from fedkd.cli.progress import Bar, Lines, Silent, Tracker, View, plural
from fedkd.cli.screen import screen
from fedkd.config import Experiment
from fedkd.engine.folder import RunFolder
from fedkd.engine.study import StudyResult, run_study
from fedkd.errors import ConfigError, FedkdError


def run(
    arguments: Sequence[str], out: Path | None, *, resume: bool, quiet: bool, workspace: Path
) -> int:
    """Run and return the exit code.

    Raises:
        ConfigError: the experiment, or the folder, is impossible.
        RunError: what concerns all runs failed, for instance a full disk.
    """
    experiment, folder = plan(arguments, out, resume=resume, workspace=workspace)
    tracker = Tracker(view(quiet))
    if not quiet:
        tracker.view.note(f"{experiment.name}: results go to {folder}")
    study: StudyResult | None = None
    try:
        try:
            with failures_told_once():
                study = run_study(
                    experiment, folder, resume=resume, watcher=tracker, workspace=workspace
                )
        finally:
            tracker.view.end()
        return finish(study, tracker, workspace)
    except KeyboardInterrupt:
        return interrupted(tracker, folder, study, workspace)
    except (FedkdError, BrokenPipeError):
        raise
    except Exception as error:
        return defect(error, tracker, folder, study, workspace)


def plan(
    arguments: Sequence[str], out: Path | None, *, resume: bool, workspace: Path
) -> tuple[Experiment, Path]:
    """Return what is run and where.

    With ``--resume --out DIR`` the experiment is the one in DIR unless a file is given.
    """
    experiment = read(arguments, workspace, config_of(out) if resume and out else None)
    if experiment.sweep != Sweep() and not resume:
        raise ConfigError(
            f"{experiment.name} is a sweep ([sweep] in its file), and fedkd run does no more than "
            f"one point: use {shlex.join(['fedkd', 'sweep', *arguments])}, or take [sweep] out"
        )
    if out is not None:
        return experiment, out
    find = newest(workspace, experiment) if resume else next_free(workspace, experiment.name)
    return experiment, find


def view(quiet: bool) -> View:
    """Return how progress is shown: on stderr, so that stdout holds the table only."""
    if quiet:
        return Silent()
    console = screen(err=True)
    if console.is_terminal and not console.is_dumb_terminal:
        return Bar(console)

    def write(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    return Lines(write)


@contextmanager
def failures_told_once() -> Iterator[None]:
    """Keep the grid from logging failing clients too: the tracker tells of them."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("fedkd.engine.grid")
    logger.addFilter(nothing)
    try:
        yield
    finally:
        logger.removeFilter(nothing)


def finish(study: StudyResult, tracker: Tracker, workspace: Path) -> int:
    """Write and print the report; return 1 if a run failed."""
    from fedkd import report
    from fedkd.report import tables

    shown = report.write(study)
    console = screen()
    tables.show(shown, console)
    console.print()
    if tracker.standing.failures:
        console.print(
            f"{plural(tracker.standing.failures, 'client failure')}; the runs went on without. "
            "Each is in events.log of its run, with what the client was given in failures/."
        )
    for cell in study.failed:
        complain(f"run {cell.label}, seed {cell.seed} failed: {cell.error}")
    if study.failed:
        command = resume_command(study.folder, workspace)
        console.print(f"Go on with what failed: {command}", soft_wrap=True)
    console.print(f"Results: {study.folder}", soft_wrap=True)
    return 1 if study.failed else 0


def interrupted(tracker: Tracker, folder: Path, study: StudyResult | None, workspace: Path) -> int:
    """Say where Ctrl-C hit and how to go on; return 130."""
    standing = tracker.standing
    if study is not None:
        message = f"stopped; all runs are finished. Make the report by: fedkd report {folder}"
    elif standing.run == 0:
        message = "stopped before the first round; nothing was written"
    else:
        during = standing.round + 1
        message = (
            f"stopped in round {min(during, standing.rounds)} of {standing.title}; nothing "
            f"finished is lost. Go on with: {resume_command(folder, workspace)}"
        )
    complain(message)
    return INTERRUPTED


def defect(
    error: Exception, tracker: Tracker, folder: Path, study: StudyResult | None, workspace: Path
) -> int:
    """Say what went wrong, keep the traceback where it can be found; return 1."""
    standing, trace = tracker.standing, traceback.format_exc()
    place = folder if study is not None else tracker.folder
    where = f"in round {standing.round + 1} of {standing.title}: " if standing.run else ""
    if os.environ.get("FEDKD_TRACEBACK") == "1" or place is None or not place.is_dir():
        complain(f"{where}{unexpected(error)}\n{trace}")
        return 1
    try:
        RunFolder(place).event(f"{where}{unexpected(error)}\n{trace}")
        note = f"The traceback is in {place / 'events.log'}."
    except FedkdError:
        note = trace
    again = (
        f"Make the report again by: fedkd report {folder}"
        if study is not None
        else f"Nothing finished is lost; go on with: {resume_command(folder, workspace)}"
    )
    complain(f"{where}{unexpected(error)}\n{note} {again}")
    return 1
