"""Clients side by side in processes: for work of many small operations, which threads do in turn.

Workers are forked once, with the data in their memory, and kept; pieces of work and their results
travel over sockets. Where the system cannot fork there is no such executor.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from multiprocessing.connection import wait
from typing import Annotated, Any

import torch
from pydantic import Field

from fedkd.engine.executors.base import Executor, Homed, Outcome, R, T, cores
from fedkd.engine.executors.channel import Channel, Packed, address, pack
from fedkd.engine.executors.shares import Shares
from fedkd.engine.executors.worker import SIGNALS, live, log_again
from fedkd.engine.registries import executors
from fedkd.errors import ConfigError, RunError
from fedkd.options import options

PATIENCE = 5.0
"""Seconds that a worker gets to end by itself; and between two looks whether all are alive."""
SILENCE = 60.0
"""Seconds without any answer after which the log says who is at work; twice as long the next."""
log = logging.getLogger(__name__)


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
    there, apart from what it returns, stays in its worker. Not for CUDA, nor for Windows, nor for
    clients that use libraries with threads of their own, which a fork leaves behind: these need
    ``thread`` or ``serial``. Torch and OpenMP are kept at one thread.
    """

    workers: Annotated[
        int | None, Field(ge=1, description="processes; none: one for each core we may use")
    ] = None

    @property
    def shares_memory(self) -> bool:
        """Whether work changes this process's own objects: never."""
        return False

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
        crew: _Crew | None = self.__dict__.get("_crew")
        if crew is not None and (crew.function != function or crew.owner != os.getpid()):
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
            _end(crew.workers, crew.owner, kill)

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
        self.owner, self.silence = os.getpid(), SILENCE
        self.ended = weakref.finalize(self, _end, self.workers, self.owner, False)

    def do(
        self,
        function: Callable[[Any], Any],
        items: Sequence[Any],
        costs: Sequence[float],
        workers: int,
    ) -> list[Outcome[Any]]:
        """Have ``items`` done by as many workers as there is work for."""
        self.function = function
        # Where torch is built for GPUs, what runs here meanwhile may spoil a later fork.
        whole = torch.backends.cuda.is_built()
        while len(self.workers) < (workers if whole else min(workers, len(items))):
            _fork(function, self.workers)
        crew = self.workers[: min(workers, len(items))]
        homes = [self.homes.get(i.home) if isinstance(i, Homed) else None for i in items]
        shares, post = Shares(costs, len(crew), homes), _Post(items)
        done: dict[int, Outcome[Any]] = {}
        for number, worker in enumerate(crew):
            worker.slots, worker.fresh = set(), True
            self._give(number, shares, post)
        heard = time.monotonic()
        while len(done) < len(items):
            speaking = _speaking(crew)
            if speaking:
                heard = time.monotonic()
            elif time.monotonic() - heard > self.silence:
                self._complain(crew, items)
            for number in speaking:
                index, outcome = _hear(crew[number])
                done[index] = outcome
                if isinstance(item := items[index], Homed):
                    self.homes[item.home] = number
                if not crew[number].doing:
                    self._give(number, shares, post)
        return [done[index] for index in range(len(items))]

    def _complain(self, crew: Sequence[_Worker], items: Sequence[Any]) -> None:
        """Say whose work takes long, and what to do where it hangs."""
        at = [worker.doing[0] for worker in crew if worker.doing]
        names = [i.whose if isinstance(i := items[n], Homed) else f"piece {n}" for n in at]
        log.warning(
            "no answer for %g s from the worker processes, which are at %s. If they hang, a "
            "library may wait for threads that a fork leaves behind: use engine.executor = "
            "'thread' or 'serial'",
            self.silence,
            ", ".join(names),
        )
        self.silence *= 2

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
        often = Counter(place for places in self.places for place in places)
        several = sorted(place for place, times in often.items() if times > 1)
        self.slot = {place: number for number, place in enumerate(several)}

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


def cannot_fork() -> str:
    """Return why this process is better not forked; nothing: it can be."""
    if sys.platform != "linux":
        return f"forking is not safe on {sys.platform}"
    # With a GPU at hand, autograd keeps threads for it, used or not, which do not survive a fork.
    there = torch.cuda.device_count() or torch.accelerator.is_available()
    return "there is a GPU" if there else ""


def _fork(function: Callable[[Any], Any], workers: list[_Worker]) -> None:
    """Fork one more of ``workers``.

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
    # A signal right after the fork must find the worker's handlers, not the parent's.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        with warnings.catch_warnings():
            # Other threads are torch's own, which a worker with one torch thread never needs.
            warnings.filterwarnings(
                "ignore", "This process .* is multi-threaded", DeprecationWarning
            )
            pid = os.fork()
        if pid == 0:
            live(function, theirs, parent, [ours, *(other.channel for other in workers)])
        theirs.close()
        workers.append(_Worker(pid, ours))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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
