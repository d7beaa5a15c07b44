"""One client after the other: the reference that every other executor is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedkd.engine.executors.base import Executor, Outcome, R, T, attempt
from fedkd.engine.registries import executors
from fedkd.options import options


@executors.register("serial")
@options
class Serial(Executor):
    """One after the other in the caller's thread: breakpoints and profilers work."""

    def map(
        self, function: Callable[[T], R], items: Sequence[T], costs: Sequence[float]
    ) -> list[Outcome[R]]:
        """Return the outcomes in the order of ``items``."""
        return [attempt(function, item) for item in items]
