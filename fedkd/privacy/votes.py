"""Votes in place of soft targets: a bounded answer that survives noise where probabilities do not.

Each client votes for one class of each public query, the server adds noise to the counts and tells
the winner (GNMax), or tells it only where enough clients agree (confident-GNMax).
"""

from __future__ import annotations

import numpy as np

from fedkd.errors import ConfigError
from fedkd.privacy.options import Release
from fedkd.privacy.payload import Scores
from fedkd.privacy.sensitivity import checked
from fedkd.rng import Rng
from fedkd.types import Arrays

MARGIN = 20.0
"""Nats between the winner and all others, at the temperature of a query, where logits are due."""


class GNMax:
    """The class with most votes after Gaussian noise, ``argmax_j (n_j + N(0, s^2))``, one-hot.

    A client's Q votes are one vector of L2 norm ``bound = sqrt(Q)``: 1 a query. The votes of a
    round are one joint release with ``s = z sqrt(Q)``; its RDP is ``alpha / (2 z^2)``, that is
    ``alpha / (2 s^2)`` a query for a client that is there or not. Another vote in place of one
    moves two counts, sqrt(2), hence ``alpha / s^2`` in the source; fedkd accounts replace-one as
    z / 2 throughout, a sensitivity of 2, which is on the safe side. Ties go to the lowest class.
    A client that said nothing votes for nobody.
    Source: Papernot et al., Scalable Private Learning with PATE, ICLR 2018, proposition 8.
    """

    def __init__(self, part: Scores) -> None:
        self.part = part
        self.bound: float = part.rows**0.5

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the votes (Q K,): a one at the largest score of each query.

        Raises:
            RunError: scores of wrong shape or not finite.
        """
        q, k = self.part.rows, self.part.classes
        votes = np.zeros((q, k))
        if self.part.key in arrays:
            scores = checked(self.part.key, arrays[self.part.key], (q, k))
            votes[np.arange(q), scores.argmax(1)] = 1.0
        return votes.ravel()

    def decode(self, total: np.ndarray, expected: float, noise_std: float) -> Arrays:
        """Return the winners of the noisy counts ``total`` as the strategy's own scores."""
        winners = total.reshape(self.part.rows, self.part.classes).argmax(1)
        return self.answers(winners, np.ones(self.part.rows, dtype=bool))

    def answers(self, winners: np.ndarray, answered: np.ndarray) -> Arrays:
        """Return one-hot rows for ``winners`` (Q,), uniform ones where not ``answered`` (Q,).

        As logits they are centred, with ``MARGIN`` times the query's temperature for the winner.
        """
        k = self.part.classes
        hot = np.eye(k)[winners]
        if self.part.space == "probs":
            rows = np.where(answered[:, None], hot, 1.0 / k)
        else:
            t = self.part.temperatures
            scale = MARGIN * (np.ones(len(hot)) if t is None else np.asarray(t, np.float64))
            rows = np.where(answered[:, None], (hot - 1.0 / k) * scale[:, None], 0.0)
        return {self.part.key: rows.astype(np.float32)}


class ConfidentGNMax:
    """GNMax that answers only where the noisy largest count reaches a share of expected votes.

    Step 1 releases ``max_j n_j + N(0, s1^2)`` of all Q queries (L2 sensitivity 1 each) and compares
    with ``vote_threshold * expected``; step 2 is GNMax with noise s2 on the A queries that passed.
    The others get a uniform row: students learn there to be unsure. With ``h = threshold_share``,
    ``s1 = z sqrt(Q / h)`` and ``s2 = z sqrt(Q / (1 - h))``, so that all answered cost multiplier z;
    A of them cost ``(Q / s1^2 + A / s2^2)^-1/2 = z / sqrt(h + (1 - h) A / Q)``.

    What may be accounted: z (:meth:`worst`), always, with every accountant and sampling: what is
    told follows from all Q noisy maxima and all Q noisy counts, which are one Gaussian release at
    z. The cheaper multiplier of the realised A only in a Renyi filter (Feldman and Zrnic,
    Individual Privacy Accounting via a Renyi Filter, NeurIPS 2021): the rdp accountant, a budget
    ``max_epsilon`` that is then the guarantee, and NO amplification by sampling (rate 1): A depends
    on step 1, which saw the same sampled cohort, so the amplified cost at the realised A is no
    bound.
    Source: Papernot et al., Scalable Private Learning with PATE, ICLR 2018, algorithm 1.
    """

    def __init__(self, part: Scores, release: Release) -> None:
        if release.threshold_share >= 1:
            raise ConfigError(
                "privacy.release.threshold_share = 1 leaves no budget to the answers; set it below "
                "1, for instance 0.3, or use votes = 'gnmax'"
            )
        self.votes = GNMax(part)
        self.bound: float = self.votes.bound
        self.share, self.threshold = release.threshold_share, release.vote_threshold

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the votes (Q K,), see :meth:`GNMax.encode`."""
        return self.votes.encode(arrays)

    def decode(self, total: np.ndarray, expected: float, noise_std: float) -> Arrays:
        """Return plain GNMax: counts that carry noise already were paid for in full."""
        return self.votes.decode(total, expected, noise_std)

    def worst(self, noise_multiplier: float) -> float:
        """Return the smallest multiplier that a round can come to: all queries answered."""
        return noise_multiplier

    def stds(self, noise_multiplier: float) -> tuple[float, float]:
        """Return (s1, s2), the noise of a threshold and of a count, for the worst case z."""
        full = noise_multiplier * self.bound
        return full / self.share**0.5, full / (1.0 - self.share) ** 0.5

    def spent(self, noise_multiplier: float, answered: int) -> float:
        """Return the multiplier of a round in which ``answered`` queries were answered."""
        used = self.share + (1.0 - self.share) * answered / self.votes.part.rows
        return noise_multiplier / used**0.5

    def release_sum(
        self, total: np.ndarray, noise_multiplier: float, expected: float, rng: Rng
    ) -> tuple[Arrays, float]:
        """Return the answers and the multiplier of the realised round; ``total`` has no noise yet.

        The multiplier is public: it follows from the noisy thresholds. See the class for where it
        may be accounted; elsewhere account :meth:`worst`.
        """
        counts = total.reshape(self.votes.part.rows, self.votes.part.classes)
        s1, s2 = self.stds(noise_multiplier)
        agreed = counts.max(1) + s1 * rng.child("threshold").numpy().normal(size=len(counts))
        answered = agreed >= self.threshold * expected
        noisy = counts + s2 * rng.child("votes").numpy().normal(size=counts.shape)
        arrays = self.votes.answers(noisy.argmax(1), answered)
        return arrays, self.spent(noise_multiplier, int(answered.sum()))
