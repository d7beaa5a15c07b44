"""How the client work of one batch is run: a choice that must never change its result.

An executor gets independent pieces of work and returns their outcomes in the order asked for.
"""

from __future__ import annotations

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import torch
from pydantic import Field

from fedkd.engine.registries import executors
from fedkd.options import build, options

R = TypeVar("R")


@dataclass(frozen=True)
class Outcome(Generic[R]):
    """What became of one piece of work: a value, or an error with its traceback as text."""

    value: R | None = None
    error: BaseException | None = None
    traceback: str = ""

    def get(self) -> R:
        """Return the value.

        Raises:
            BaseException: the error, where there was one.
        """
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


def attempt(function: Callable[..., R], *args: Any) -> Outcome[R]:
    """Call ``function`` and return its outcome; an error harms nobody else's work.

    ``SystemExit`` counts as an error too: one client that calls ``sys.exit()`` must not end the
    run. ``KeyboardInterrupt`` is the user's and goes through.
    """
    try:
        return Outcome(function(*args))
    except (Exception, SystemExit) as error:
        return Outcome(error=error, traceback=traceback.format_exc())


class Executor(ABC):
    """Runs ``function(0), ..., function(n - 1)``, n = ``len(costs)``, in whatever way it likes."""

    @abstractmethod
    def map(self, function: Callable[[int], R], costs: Sequence[float]) -> list[Outcome[R]]:
        """Return the outcomes in index order.

        Args:
            function: independent work for each index.
            costs: expected cost of each index in any unit; only their order matters.

        Raises:
            KeyboardInterrupt: at once; work that has not started is dropped.
        """


@executors.register("serial")
@options
class Serial(Executor):
    """One after the other in the caller's thread: breakpoints and profilers work."""

    def map(self, function: Callable[[int], R], costs: Sequence[float]) -> list[Outcome[R]]:
        """Return the outcomes in index order."""
        return [attempt(function, index) for index in range(len(costs))]


@executors.register("thread")
@options
class Threads(Executor):
    """Python threads with one torch thread each: torch lets go of the GIL inside its operations.

    Longest expected work first (Graham's LPT rule), which keeps the last worker from starting a
    large client when all others are done. Grad mode and autocast are per thread in torch, so
    clients cannot disturb one another through them; global random generators they do share.
    """

    workers: Annotated[
        int | None, Field(ge=1, description="threads; none: one for each core we may use")
    ] = None

    def map(self, function: Callable[[int], R], costs: Sequence[float]) -> list[Outcome[R]]:
        """Return the outcomes in index order."""
        longest_first = sorted(range(len(costs)), key=lambda index: -costs[index])
        workers = min(self.workers or cores(), max(1, len(costs)))
        # The number of torch threads belongs to a thread as well as to the process.
        pool = ThreadPoolExecutor(workers, "fedkd", torch.set_num_threads, (1,))
        try:
            futures = {i: pool.submit(attempt, function, i) for i in longest_first}
            outcomes = [futures[index].result() for index in range(len(costs))]
        except BaseException:
            # Ctrl-C: drop what is queued, do not wait for the clients that are running.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
        return outcomes


def make_executor(name: str = "auto", workers: int | None = None) -> Executor:
    """Return the executor called ``name``; ``auto`` is :func:`default_executor`.

    Raises:
        ConfigError: there is none of that name, or it does not take that number of workers.
    """
    if name == "auto":
        return default_executor(workers)
    given = {} if workers is None else {"workers": workers}
    return build(executors.get(name), given, f"executor {name}")


def default_executor(workers: int | None = None) -> Executor:
    """Return ``thread`` where there is more than one core to use, else ``serial``."""
    count = cores() if workers is None else workers
    return Serial() if count == 1 else build(Threads, {"workers": workers}, "executor thread")


def cores() -> int:
    """Return how many cores this process may use; its CPU affinity counts where there is one."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Set torch to one thread for each operation; put the old number back at the end.

    Torch splits sums differently for a different number of threads, and floating-point sums
    depend on that. A client is therefore always trained with one, whatever the executor.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
