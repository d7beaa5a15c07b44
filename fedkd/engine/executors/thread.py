"""Clients side by side in threads: for work that spends its time inside large torch operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field

from fedkd.engine.executors.base import Executor, Outcome, R, T, attempt, cores, longest_first
from fedkd.engine.registries import executors
from fedkd.options import options


@executors.register("thread")
@options
class Threads(Executor):
    """Python threads with one torch thread each: torch lets go of the GIL inside its operations.

    Longest expected work first. Grad mode and autocast are per thread in torch, so clients cannot
    disturb one another through them; global random generators they do share.
    """

    workers: Annotated[
        int | None, Field(ge=1, description="threads; none: one for each core we may use")
    ] = None

    def map(
        self, function: Callable[[T], R], items: Sequence[T], costs: Sequence[float]
    ) -> list[Outcome[R]]:
        """Return the outcomes in the order of ``items``."""
        try:
            futures = {
                index: self._pool.submit(attempt, function, items[index])
                for index in longest_first(costs)
            }
            return [futures[index].result() for index in range(len(costs))]
        except BaseException:
            # Ctrl-C: drop what is queued, do not wait for the clients that are running.
            self._end(wait=False)
            raise

    def close(self) -> None:
        """End the threads."""
        self._end(wait=True)

    def _end(self, wait: bool) -> None:
        pool: ThreadPoolExecutor | None = self.__dict__.pop("_pool", None)
        if pool is not None:
            pool.shutdown(wait=wait, cancel_futures=True)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # The number of torch threads belongs to a thread as well as to the process.
        return ThreadPoolExecutor(self.workers or cores(), "fedkd", torch.set_num_threads, (1,))
