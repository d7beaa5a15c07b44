"""Worker processes for the runs of a sweep, each with an equal share of the cores.

A process that dies (out of memory, killed) costs the run that it was doing, and nothing else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fedkd.engine.executors import cores
from fedkd.errors import FedkdError
from fedkd.sweep.failed import keep_reason
from fedkd.sweep.plan import PlannedRun
from fedkd.sweep.worker import Told, run_one, serve, shared

Listener = Callable[[PlannedRun, Told], None]


def threads_of(jobs: int) -> int:
    """Return the worker threads of each job: an equal share of the cores, at least one."""
    return max(1, cores() // max(1, jobs))


def run_all(
    runs: Sequence[PlannedRun],
    jobs: int,
    listen: Listener,
    workspace: Path,
) -> None:
    """Do all runs, ``jobs`` at a time, in order; tell ``listen`` how each goes.

    One job is done in this process. Ctrl-C ends all of them; finished rounds stay.
    """
    if min(jobs, len(runs)) <= 1:
        for run in runs:
            made = shared(run.experiment, threads_of(1))
            run_one(made, run.folder, _teller(run, listen))
        return
    crew = [_Worker(threads_of(jobs), workspace) for _ in range(min(jobs, len(runs)))]
    waiting = list(reversed(runs))
    try:
        for worker in crew:
            worker.give(waiting.pop())
        while any(worker.run for worker in crew):
            ready = wait([w.connection for w in crew if w.run])
            for worker in crew:
                if worker.connection in ready:
                    worker.hear(listen)
                if worker.run is None and waiting:
                    worker.give(waiting.pop())
    finally:
        for worker in crew:
            worker.stop()


def _teller(run: PlannedRun, listen: Listener) -> Callable[[Told], None]:
    return lambda told: listen(run, told)


class _Worker:
    """A process and what it is doing; started anew when it has died."""

    def __init__(self, threads: int, workspace: Path) -> None:
        self.threads, self.workspace = threads, workspace
        self.run: PlannedRun | None = None
        self.connection, self.process = self._start()

    def _start(self) -> tuple[Connection, BaseProcess]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, str(self.workspace), self.threads), daemon=True
        )
        with _no_interrupts():
            process.start()
        theirs.close()
        return ours, process

    def give(self, run: PlannedRun) -> None:
        self.run = run
        table: dict[str, Any] = {"table": run.experiment.table(), "folder": str(run.folder)}
        try:
            self.connection.send(table)
        except OSError:
            # It died before it had anything to do: hear() will find it gone.
            return

    def hear(self, listen: Listener) -> None:
        """Pass on one message; where the process has died, say so and start another."""
        run = self.run
        assert run is not None
        try:
            told: Told = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            told = ("failed", {"error": _died(self.process.exitcode)})
            with contextlib.suppress(FedkdError):  # A full disk: the reason is told all the same.
                keep_reason(run.folder, told[1]["error"])
            self.connection.close()
            self.connection, self.process = self._start()
        if told[0] != "round":
            self.run = None
        listen(run, told)

    def stop(self) -> None:
        if self.run is None and self.process.is_alive():
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()
            self.process.join()
        self.connection.close()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back: a process that begins inherits that, until it has its own answer.

    Without, it would die with a traceback where Ctrl-C comes while it imports. Ours comes later.
    """
    if sys.platform == "win32":
        yield
        return
    # It would let signals through where it is started here, as the first process's helper.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _died(code: int | None) -> str:
    """Say how a process ended."""
    if code is not None and code < 0:
        reason = f"was killed by signal {-code}"
        return f"the process of this run {reason}" + (
            " (out of memory?); try fewer jobs" if code == -9 else ""
        )
    return f"the process of this run ended with exit code {code}"
