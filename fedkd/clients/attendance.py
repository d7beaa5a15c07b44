"""Participation in one federation, round by round: who is asked, whose upload is lost, how long.

Everything follows from the seed, and (labels, deadline) from the clients' data, so that a resumed
run, other workers and another strategy see the same rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedkd.clients.availability import by_label, power_law, there
from fedkd.clients.participation import Participation
from fedkd.rng import stream

KEPT = 8
"""Rounds whose cohorts are remembered."""
JITTER = 0.5
"""How much a client's speed changes from round to round, in units of that over clients."""


@dataclass(frozen=True, eq=False)
class Attendance:
    """Who takes part when: options of participation, bound to the clients of a federation.

    ``examples`` (N,) training examples of clients 0..N-1; ``shares`` (N, C) the share of each class
    in them, None for text. ``pooled``: there is one pseudo-client, always there and never late.

    A client's time for round t is ``n_k exp(sigma (z_k + z_tk / 2))`` over the median over clients
    of ``n_k exp(sigma z_k)``: n_k its training examples, z standard normal, sigma ``slowness``. So
    1 is the federation's median time for a round, whatever that is in seconds.

    A *lost* upload is one that the server never gets, though the client did its work and keeps what
    it learned: by a coin (``dropout``) or since the client's time is above ``deadline``.
    """

    participation: Participation
    seed: int
    examples: tuple[int, ...]
    shares: np.ndarray | None = None
    pooled: bool = False

    @property
    def clients(self) -> range:
        """The ids of all that can take part."""
        return range(1 if self.pooled else len(self.examples))

    @property
    def lossy(self) -> bool:
        """Whether an upload can be lost."""
        options = self.participation
        return not self.pooled and (options.dropout > 0 or options.deadline is not None)

    def cohort(self, round_: int) -> list[int]:
        """Return the clients that do the work of a round, in ascending order; there may be none."""
        if round_ not in self._cohorts:
            # Several ask for that of one round; with many clients drawing takes its time.
            while len(self._cohorts) >= KEPT:
                self._cohorts.pop(next(iter(self._cohorts)), None)
            self._cohorts[round_] = self._drawn(round_)
        return list(self._cohorts[round_])

    def _drawn(self, round_: int) -> list[int]:
        if self.pooled:
            return [0]
        chance = self._chance(round_)
        if chance is None:
            return self.participation.cohort(self.seed, round_, self.clients)
        present = there(chance, self.seed, round_, self.clients)
        return self.participation.cohort(self.seed, round_, self.clients, set(present))

    def scheduled(self, round_: int) -> list[int]:
        """Return whose turn it is, there or not: what is known of a round before it begins."""
        return [0] if self.pooled else self.participation.cohort(self.seed, round_, self.clients)

    def lost(self, round_: int) -> list[int]:
        """Return the clients of a cohort whose upload is lost, in ascending order."""
        if not self.lossy:
            return []
        return [k for k in self.cohort(round_) if self._drops(round_, k) or self._late(round_, k)]

    def clock(self, round_: int) -> float | None:
        """Return the simulated duration of a round; None where no time is simulated.

        ``min(deadline, slowest of the cohort)``, in median times of a round; 0 for nobody.
        """
        options = self.participation
        if self.pooled or not (options.slowness or options.deadline):
            return None
        slowest = max((self.time(round_, k) for k in self.cohort(round_)), default=0.0)
        return min(slowest, options.deadline or math.inf)

    def time(self, round_: int, client: int) -> float:
        """Return how long a client's work of a round takes, in median times of a round."""
        sigma = self.participation.slowness
        jitter = sigma * JITTER * _normal(self.seed, "jitter", round_, client) if sigma else 0.0
        return self._plain[client] * math.exp(jitter) / self._median

    def turns(self, rounds: Iterable[int], scheduled: bool = False) -> tuple[int, ...]:
        """Return in how many of ``rounds`` each client is in the cohort (or has its turn), (N,)."""
        turns = [0] * len(self.examples)
        for round_ in rounds:
            for k in self.scheduled(round_) if scheduled else self.cohort(round_):
                turns[k] += 1
        return tuple(turns)

    def presence(self) -> float:
        """Return the mean probability to be there, as far as it is public; 1 for ``label``."""
        if self.pooled or self.participation.availability != "power-law":
            return 1.0
        return float(self._by_rank.mean())

    def _chance(self, round_: int) -> np.ndarray | None:
        """Return the probability of each client to be there in a round; None for certainty."""
        options = self.participation
        match options.availability:
            case "always":
                return None
            case "power-law":
                return self._by_rank
            case "label":
                assert self.shares is not None
                return by_label(self.shares, options.strength, options.period, round_)

    @cached_property
    def _cohorts(self) -> dict[int, list[int]]:
        """The cohorts of the last few rounds that somebody asked for."""
        return {}

    @cached_property
    def _by_rank(self) -> np.ndarray:
        return power_law(self.participation.exponent, self.seed, self.clients)

    def _drops(self, round_: int, client: int) -> bool:
        coin = stream(self.seed, "dropout", round_, client).uniform()
        return coin < self.participation.dropout

    def _late(self, round_: int, client: int) -> bool:
        deadline = self.participation.deadline
        return deadline is not None and self.time(round_, client) > deadline

    @cached_property
    def _plain(self) -> list[float]:
        """Each client's time without jitter, in units of one example of a client of speed 1."""
        sigma = self.participation.slowness
        speeds = [math.exp(sigma * _normal(self.seed, "slowness", k)) for k in self.clients]
        return [n * s for n, s in zip(self.examples, speeds, strict=True)]

    @cached_property
    def _median(self) -> float:
        # A federation of clients without examples has no median: everything then takes no time.
        return float(np.median(self._plain)) or 1.0


def _normal(seed: int, *path: str | int) -> float:
    return float(stream(seed, *path).numpy().standard_normal())
