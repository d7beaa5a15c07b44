"""Clients side by side in processes: for work of many small operations, which threads do in turn.

Workers are forked once, with the data in their memory, and kept; pieces of work and their results
travel over sockets. Where the system cannot fork there is no such executor.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import wait
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from fedkd.engine.executors.base import Executor, Homed, Outcome, R, T, cores
from fedkd.engine.executors.channel import Channel, Packed, address, pack
from fedkd.engine.executors.shares import Shares
from fedkd.engine.executors.worker import live, log_again
from fedkd.engine.registries import executors
from fedkd.errors import ConfigError, RunError
from fedkd.options import options

PATIENCE = 5.0
"""Seconds that a worker gets to end by itself; and between two looks whether all are alive."""


class DeadWorkerError(RunError):
    """A worker process died; ``index`` is the piece of work that it was at."""

    def __init__(self, index: int, how: str) -> None:
        super().__init__(
            f"a worker process {how} while it did piece {index} of the work; use the executor "
            "'thread', or fewer workers"
        )
        self.index, self.how = index, how


@executors.register("process")
@options
class Processes(Executor):
    """Forked worker processes with one torch thread each, kept from exchange to exchange.

    They have the parent's memory as it was when they were forked; what a client's work changes
    there, apart from what it returns, stays in its worker. Not for CUDA, nor for Windows.
    """

    shares_memory: ClassVar[bool] = False
    workers: Annotated[
        int | None, Field(ge=1, description="processes; none: one for each core we may use")
    ] = None

    def map(
        self, function: Callable[[T], R], items: Sequence[T], costs: Sequence[float]
    ) -> list[Outcome[R]]:
        """Return the outcomes in the order of ``items``.

        Raises:
            DeadWorkerError: a worker was killed or left; the others are ended too.
            ConfigError: this system cannot fork, or CUDA is in use, which cannot be forked.
        """
        if not items:
            return []
        if self.__dict__.get("_crew") is not None and self._crew.function != function:
            self.close()
        try:
            return self._crew.do(function, items, costs, self.workers or cores())
        except BaseException:
            # What is under way belongs to nobody any more.
            self._end(kill=True)
            raise

    def close(self) -> None:
        """End the workers."""
        self._end(kill=False)

    def _end(self, kill: bool) -> None:
        crew: _Crew | None = self.__dict__.pop("_crew", None)
        if crew is not None:
            crew.ended.detach()
            _end(crew.workers, os.getpid(), kill)

    @cached_property
    def _crew(self) -> _Crew:
        return _Crew()


@dataclass(eq=False)
class _Worker:
    """A forked process as its parent sees it; ``doing``: pieces sent, but not answered yet."""

    pid: int
    channel: Channel
    doing: list[int] = field(default_factory=list)
    slots: set[int] = field(default_factory=set)
    fresh: bool = True
    alive: bool = True


class _Crew:
    """The workers of one executor; they end when it is forgotten, at the latest."""

    def __init__(self) -> None:
        self.function: Callable[[Any], Any] | None = None
        self.workers: list[_Worker] = []
        self.homes: dict[int, int] = {}
        self.ended = weakref.finalize(self, _end, self.workers, os.getpid(), False)

    def do(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        costs: Sequence[float],
        workers: int,
    ) -> list[Outcome[Any]]:
        """Have ``items`` done by as many workers as there is work for."""
        self.function = function
        while len(self.workers) < min(workers, len(items)):
            self.workers.append(_fork(function, self.workers))
        crew = self.workers[: min(workers, len(items))]
        homes = [self.homes.get(i.home) if isinstance(i, Homed) else None for i in items]
        shares, post = Shares(costs, len(crew), homes), _Post(items)
        done: dict[int, Outcome[Any]] = {}
        for number, worker in enumerate(crew):
            worker.slots, worker.fresh = set(), True
            self._give(number, shares, post)
        while len(done) < len(items):
            for number in _speaking(crew):
                index, outcome = _hear(crew[number])
                done[index] = outcome
                if isinstance(item := items[index], Homed):
                    self.homes[item.home] = number
                if not crew[number].doing:
                    self._give(number, shares, post)
        return [done[index] for index in range(len(items))]

    def _give(self, number: int, shares: Shares, post: _Post) -> None:
        """Send a worker its next batch, where there is one."""
        worker, batch = self.workers[number], shares.take(number)
        if not batch:
            return
        worker.doing = batch
        # Where it is dead already, the next look at its answers tells.
        with suppress(BrokenPipeError, ConnectionResetError):
            post.send(worker, batch)


class _Post:
    """The pieces of one exchange; an array that several of them hold is sent to a worker once."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.packed = [pack(item) for item in items]
        self.places = [[address(b) for b in packed.buffers] for packed in self.packed]
        first, several = dict[tuple[int, int], int](), set[tuple[int, int]]()
        for piece, places in enumerate(self.places):
            several |= {place for place in places if first.setdefault(place, piece) != piece}
        self.slot = {place: number for number, place in enumerate(sorted(several))}

    def send(self, worker: _Worker, batch: list[int]) -> None:
        """Send the pieces of a batch in one message."""
        buffers, pieces, slots = list[memoryview](), [], []
        for index in batch:
            places = []
            for buffer, place in zip(self.packed[index].buffers, self.places[index], strict=True):
                slot = self.slot.get(place)
                if slot is not None and slot not in worker.slots:
                    worker.slots.add(slot)
                    slots.append((slot, len(buffers)))
                    buffers.append(buffer)
                elif slot is None:
                    buffers.append(buffer)
                places.append(len(buffers) - 1 if slot is None else -slot - 1)
            pieces.append((index, self.packed[index].body, places))
        order = {"fresh": worker.fresh, "slots": slots, "pieces": pieces}
        worker.fresh = False
        worker.channel.send(order, buffers)


def _hear(worker: _Worker) -> tuple[int, Outcome[Any]]:
    """Take one answer of a worker."""
    try:
        (index, body, records), buffers = worker.channel.receive()
    except (EOFError, OSError):
        raise DeadWorkerError(worker.doing[0], _how(worker)) from None
    log_again(records)
    if isinstance(body, str):
        raise KeyboardInterrupt(f"{body} in piece {index} of the work")
    worker.doing.remove(index)
    return index, Packed(body).unpack(buffers)


def _fork(function: Callable[[Any], Any], others: Sequence[_Worker]) -> _Worker:
    """Fork a worker.

    Raises:
        ConfigError: this system cannot fork, or CUDA is in use.
    """
    if sys.platform == "win32":
        raise ConfigError("executor 'process' needs fork, which Windows has not; use 'thread'")
    if torch.cuda.is_initialized():
        raise ConfigError("executor 'process' cannot fork a process that uses CUDA; use 'thread'")
    ours, theirs = Channel.pair()
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with warnings.catch_warnings():
        # Other threads are torch's own, which a worker with one torch thread never needs.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        ours.close()
        for other in others:
            other.channel.close()
        live(function, theirs, parent)
    theirs.close()
    return _Worker(pid, ours)


def _speaking(crew: Sequence[_Worker]) -> list[int]:
    """Wait for busy workers; return those that have answered or died, none where it takes long."""
    busy = {worker.channel.fileno(): n for n, worker in enumerate(crew) if worker.doing}
    ready = [busy[fileno] for fileno in wait(list(busy), PATIENCE) if isinstance(fileno, int)]
    # A process of a client's own may hold the socket of a worker that is dead.
    return ready or [n for n in busy.values() if _gone(crew[n])]


def _gone(worker: _Worker) -> bool:
    if os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        return False
    worker.channel.close()
    return True


def _how(worker: _Worker) -> str:
    """Say how a worker that says nothing any more has ended."""
    code = _reaped(worker)
    if code is None:
        return "ended"
    if code >= 0:
        return f"ended with exit code {code}"
    memory = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by signal {-code}{memory}"


def _reaped(worker: _Worker) -> int | None:
    """Wait for a worker's end, kill it where that takes long, and return its exit code."""
    until = time.monotonic() + PATIENCE
    try:
        while True:
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.002)
    except ChildProcessError:
        return None
    finally:
        worker.alive = False


def _end(workers: list[_Worker], parent: int, kill: bool) -> None:
    """End workers and wait for them; a worker's own copy of this list is none of its business."""
    if os.getpid() != parent:
        return
    all_of_them, workers[:] = list(workers), []
    for worker in all_of_them:
        with suppress(OSError):
            if kill and worker.alive:
                os.kill(worker.pid, signal.SIGKILL)
            elif worker.alive:
                worker.channel.send(None)
        worker.channel.close()
    for worker in all_of_them:
        if worker.alive:
            _reaped(worker)
