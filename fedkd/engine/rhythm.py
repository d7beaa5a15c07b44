"""In which rounds a federation is judged: as often as asked for, as long as that costs little.

Judging everybody after a round of few participants can take longer than the round. Which rounds are
left out follows from numbers of examples alone, never from a clock, so it is the same everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedkd.config import Clients
from fedkd.engine.setup import Prepared
from fedkd.metrics.options import Evaluate

TRAINED = 3.0
"""Forward passes that training on one example costs: its own, and twice as much on the way back."""


@dataclass(frozen=True)
class Rhythm:
    """The judged rounds of a run: of those that ``evaluate.every`` names, every ``coarse``-th.

    The last ``evaluate.last_k`` of them are always judged, so that what is reported of the end of
    a run does not depend on how often it was judged before. Those who took part in a round are
    judged as ``own`` in every named one: that is little, and ``stale`` is made of it.
    """

    evaluate: Evaluate
    rounds: int
    coarse: int = 1

    def __contains__(self, round_: int) -> bool:
        """Return whether a round is judged."""
        if not self.named(round_):
            return False
        place, last = self._place(round_), self._place(self.rounds)
        return place % self.coarse == 0 or place > last - self.evaluate.last_k

    def everywhere(self, round_: int) -> bool:
        """Return whether a round is judged on the global test set too, which it then is anyway."""
        every = self.evaluate.global_every
        asked = every > 0 and round_ % every == 0
        return self.named(round_) and (round_ == self.rounds or asked)

    def named(self, round_: int) -> bool:
        """Return whether ``evaluate.every`` names a round: who took part in it is judged then."""
        return round_ % self.evaluate.every == 0 or round_ == self.rounds

    def _place(self, round_: int) -> int:
        """Return which of the rounds that ``evaluate.every`` names this is, from 1."""
        return math.ceil(round_ / self.evaluate.every)


def rhythm(evaluate: Evaluate, rounds: int, trained: float, judged: float) -> Rhythm:
    """Return the judged rounds of a run that trains on ``trained`` examples a round.

    Judging goes through ``judged`` examples each time. With ``share`` s it may take s of the work:
    ``J = s / (1 - s) * rounds * 3 trained / judged`` times. If more rounds are asked for, the last
    ``last_k`` of them are judged, and of the m others every ``ceil(m / (J - last_k))``-th; of a run
    so short that this leaves less than half of J, ``ceil(2 m / J)``-th, which costs more than s.

    >>> rhythm(Evaluate(), 100, trained=60, judged=160).coarse
    7
    """
    asked = math.ceil(rounds / evaluate.every)
    if evaluate.share == 1 or not judged:
        return Rhythm(evaluate, rounds)
    times = evaluate.share / (1 - evaluate.share) * rounds * TRAINED * trained / judged
    before = asked - evaluate.last_k
    if asked <= times or before <= 0:
        return Rhythm(evaluate, rounds)
    left = max(times - evaluate.last_k, times / 2)
    return Rhythm(evaluate, rounds, math.ceil(before / left) if left else asked)


def rhythm_of(prepared: Prepared) -> Rhythm:
    """Return the judged rounds of a run: the same for all seeds, and for all strategies.

    Examples of the whole data set are counted, since how many are held out depends on the seed;
    and the local training alone, whatever else a strategy does.
    """
    experiment, dataset = prepared.experiment, prepared.federation.dataset
    held_out = experiment.data.validation * len(dataset.train_y)
    trained = trained_examples(experiment.clients, len(dataset.train_y) - held_out)
    judged = held_out + len(dataset.test_y)
    return rhythm(experiment.evaluate, experiment.rounds, trained, judged)


def trained_examples(clients: Clients, examples: float) -> float:
    """Return on how many of the federation's ``examples`` is trained in a round, as expected.

    A client that is not there counts as if it took part.
    """
    part = clients.participation
    share = 1.0 if part.scheme == "full" else part.ratio
    if clients.training.steps:
        return share * clients.count * clients.training.steps * clients.training.batch_size
    return share * examples * clients.training.epochs
