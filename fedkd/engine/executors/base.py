"""What an executor is, and what becomes of a piece of work: a value or an error.

Executors differ in where and in which order they run; apart from ``cohort``, whose sums are
ordered otherwise, their results are equal to the last bit.
"""

from __future__ import annotations

import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import torch

from fedkd.clients.local import Fitter, fit

T = TypeVar("T")
R = TypeVar("R")


class ForeignError(Exception):
    """An error from another process that only its own process can hold; shown as it was there."""

    def __repr__(self) -> str:
        return str(self)


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

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel between processes, whatever the error is made of."""
        return Outcome, (self.value, portable(self.error), self.traceback)


def portable(error: BaseException | None) -> BaseException | None:
    """Return an error that another process can read: itself, or what shows as it does."""
    if error is None:
        return None
    try:
        there = ForkingPickler.loads(ForkingPickler.dumps(error))
        same = type(there) is type(error) and repr(there) == repr(error)
    except Exception:
        same = False
    return error if same else ForeignError(repr(error))


def attempt(function: Callable[..., R], *args: Any) -> Outcome[R]:
    """Call ``function`` and return its outcome; an error harms nobody else's work.

    ``SystemExit`` counts as an error too: one client that calls ``sys.exit()`` must not end the
    run. ``KeyboardInterrupt`` is the user's and goes through.
    """
    try:
        return Outcome(function(*args))
    except (Exception, SystemExit) as error:
        return Outcome(error=error, traceback=traceback.format_exc())


@dataclass(frozen=True)
class Homed:
    """Work with a home: where it was done before, its data may still lie ready."""

    home: int

    @property
    def whose(self) -> str:
        """Whom it is done for, as messages name them."""
        return f"the work of {self.home}"


class Executor(ABC):
    """Runs ``function`` on each of ``items`` in whatever way it likes."""

    @property
    def shares_memory(self) -> bool:
        """Whether work changes this process's own objects; else only what it returns counts."""
        return True

    @abstractmethod
    def map(
        self, function: Callable[[T], R], items: Sequence[T], costs: Sequence[float]
    ) -> list[Outcome[R]]:
        """Return the outcomes in the order of ``items``.

        Args:
            function: what does one piece of work; an equal one in every call, so that workers may
                keep it.
            items: independent pieces of work, all that changes from call to call; plain data.
            costs: expected cost of each item in any unit; only ratios matter.

        Raises:
            KeyboardInterrupt: at once; work that has not started is dropped.
            RunError: a worker died.
        """

    @property
    def fitter(self) -> Fitter:
        """What trains a client's network; for an executor that trains many at once, its own."""
        return fit

    def close(self) -> None:
        """End the workers, where there are any; the next :meth:`map` starts new ones."""
        return


def longest_first(costs: Sequence[float]) -> list[int]:
    """Return indices by falling cost, equal ones in order.

    Graham's LPT rule: it keeps the last worker from starting a large client when all others are
    done.
    """
    return sorted(range(len(costs)), key=lambda index: -costs[index])


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
