"""Layer schedules: which blocks take part in the federation at which round.

FedAvg, FedPer, LG-FedAvg and FedD2S are settings of this one idea; weight averaging and
distillation both take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSchedule:
    """``stages``: (first round, blocks from then on), in ascending order of rounds from 1.

    >>> schedule = LayerSchedule.deep_to_shallow(["conv1", "conv2", "head"], every=5)
    >>> sorted(schedule(5)), sorted(schedule(6)), sorted(schedule(99))
    (['conv1', 'conv2', 'head'], ['conv1', 'conv2'], ['conv1'])
    """

    stages: tuple[tuple[int, frozenset[str]], ...]

    def __call__(self, round_: int) -> frozenset[str]:
        """Return the blocks that take part in round ``round_`` (rounds count from 1)."""
        taking_part: frozenset[str] = self.stages[0][1]
        for first, blocks in self.stages:
            if round_ >= first:
                taking_part = blocks
        return taking_part

    def dropped_at(self, block: str) -> int:
        """Return the first round in which ``block`` no longer takes part; 0 if it never does so."""
        for round_, blocks in self.stages:
            if block not in blocks:
                return round_
        return 0

    @property
    def ever(self) -> frozenset[str]:
        """The blocks that take part in some round."""
        return frozenset().union(*(blocks for _, blocks in self.stages))

    @property
    def monotone(self) -> bool:
        """Whether a dropped block never returns."""
        pairs = zip(self.stages, self.stages[1:], strict=False)
        return all(later <= earlier for (_, earlier), (_, later) in pairs)

    @staticmethod
    def always(blocks: Sequence[str]) -> LayerSchedule:
        """Return the schedule in which the same blocks always take part (FedAvg: all of them)."""
        return LayerSchedule(((1, frozenset(blocks)),))

    @staticmethod
    def dropping(
        blocks: Sequence[str], order: Sequence[str], every: int = 0, first: int = 0
    ) -> LayerSchedule:
        """Return a schedule that starts with ``blocks`` and drops those of ``order`` in turn.

        The first leaves in round ``first`` (0 means ``every + 1``, so that all take part in
        ``every`` rounds), one more every ``every`` rounds. ``every = 0`` drops the first of
        ``order`` in round ``first`` and no other; both 0 never drop.
        """
        first = first or (every + 1 if every else 0)
        leaving = list(order) if every else list(order)[:1]
        left, stages = list(blocks), [(1, frozenset(blocks))]
        for i, block in enumerate(leaving if first else ()):
            left.remove(block)
            stages.append((first + every * i, frozenset(left)))
        if len(stages) > 1 and first == 1:
            del stages[0]
        return LayerSchedule(tuple(stages))

    @staticmethod
    def deep_to_shallow(
        blocks: Sequence[str], every: int = 0, first: int = 0, drops: int | None = None
    ) -> LayerSchedule:
        """Return the schedule that drops from the deepest block on, ``drops`` blocks at most.

        At least one block stays; ``first = 1`` with ``drops = 1`` is FedPer, ``drops = 0`` FedAvg.
        """
        most = len(blocks) - 1
        count = most if drops is None else min(drops, most)
        return LayerSchedule.dropping(blocks, list(reversed(blocks))[:count], every, first)
