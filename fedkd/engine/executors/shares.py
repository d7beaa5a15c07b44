"""Which worker does what: its share first, then what others have not come to.

Work is handed out in a few batches instead of piece by piece, since each needs an answer and the
next order; the last batches are small, so that all end together.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedkd.engine.executors.base import longest_first

FIRST = 0.75
"""How much of what a worker has left it gets at once."""


class Shares:
    """Divides work over workers: longest first to the one with least, but home if that is fair.

    Args:
        costs: expected cost of each piece.
        workers: how many there are.
        homes: of each piece, the worker that has its data already, or None.
    """

    def __init__(
        self, costs: Sequence[float], workers: int, homes: Sequence[int | None] | None = None
    ) -> None:
        # A cost of nothing would all go to one.
        self.costs = [max(float(cost), 1e-9) for cost in costs]
        self.left: list[list[int]] = [[] for _ in range(workers)]
        loads, fair = [0.0] * workers, sum(self.costs) / workers
        for index in longest_first(self.costs):
            home = homes[index] if homes is not None else None
            if home is None or home >= workers or loads[home] + self.costs[index] > fair:
                home = loads.index(min(loads))
            self.left[home].append(index)
            loads[home] += self.costs[index]

    def take(self, worker: int) -> list[int]:
        """Return the next batch of a worker, longest first; empty when nothing is left to do."""
        own = self.left[worker]
        if not own:
            richest = max(self.left, key=self._load)
            # From the end: its short ones, which it would have done last.
            return [richest.pop()] if richest else []
        budget, batch = FIRST * self._load(own), list[int]()
        while own and (not batch or self.costs[own[0]] <= budget):
            budget -= self.costs[own[0]]
            batch.append(own.pop(0))
        return batch

    def _load(self, indices: list[int]) -> float:
        return sum(self.costs[index] for index in indices)
