"""What a bench asks of whatever does its work: nothing but to start, to play rounds, to stop.

One backend lives in one process. Modules of backends are imported where nothing is timed, so what
they need is imported in their methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from fedkd.bench.work import Work
from fedkd.errors import ConfigError


class Backend(ABC):
    """Federated averaging of a :class:`~fedkd.bench.work.Work`, done in one's own way.

    ``threads`` and ``workers`` are what it has where none are given; workers 0: one for each core.
    ``external`` says whose it is: figures beside ours are marked. Without ``exact`` some of it is
    float32 whatever it is asked for, and its weights may differ by as much.
    """

    threads: ClassVar[int] = 1
    workers: ClassVar[int] = 1
    external: ClassVar[bool] = False
    exact: ClassVar[bool] = True

    def available(self) -> str:
        """Return an empty string, or in a few words why it cannot run here."""
        return ""

    @abstractmethod
    def start(self, work: Work, dtype: str, threads: int, workers: int) -> None:
        """Get ready for round 1, from ``work.initial``.

        Args:
            work: what is to be done.
            dtype: ``float32`` or ``float64``, of weights and inputs alike.
            threads: of each torch operation.
            workers: clients that train at a time.
        """

    @abstractmethod
    def round(self, round_: int) -> None:
        """Play a round of the work from the weights as they are: ``w = sum_k n_k/n w_k``.

        Rounds come in any order, and again: a number only says who trains, and on which batches.
        """

    @abstractmethod
    def weights(self) -> dict[str, np.ndarray]:
        """Return the global model by the names of ``work.initial``."""

    @abstractmethod
    def samples(self) -> int:
        """Return how many examples the last round trained on, as counted by whoever trained."""

    def hash(self, work: Work) -> str:
        """Return the hash of the work as this backend has it."""
        return work.hash

    def close(self) -> None:  # noqa: B027 there may be nothing to end
        """End all that was started."""


def spec(text: str) -> tuple[str, int | None, int | None]:
    """Read ``NAME[:THREADS[xWORKERS]]``.

    Raises:
        ConfigError: it is written in another way.

    >>> spec("bare:2"), spec("pfl:1x2"), spec("thread")
    (('bare', 2, None), ('pfl', 1, 2), ('thread', None, None))
    """
    name, colon, rest = text.strip().partition(":")
    threads, by, workers = rest.partition("x")
    numbers = [threads] * bool(colon) + [workers] * bool(by)
    if not name or not all(n.isdigit() and int(n) for n in numbers):
        raise ConfigError(
            f"{text!r} is no contender; write NAME, NAME:THREADS or NAME:THREADSxWORKERS, as in "
            "bare:2 or thread:1x4"
        )
    return name, int(threads) if colon else None, int(workers) if by else None
