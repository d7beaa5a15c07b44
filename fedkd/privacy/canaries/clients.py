"""Canary clients: clients that send a random direction, so that the server's sum can be audited.

Their direction is independent of everything else, so that without them in the sum the cosine with
what the server releases is nearly ``N(0, 1/d)``, known in closed form (one-shot audit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedkd.privacy.payload import Weights
from fedkd.rng import Rng
from fedkd.types import Arrays


@dataclass
class CanaryClients:
    """``count`` clients whose update is ``C u_j``, u_j uniform on the unit sphere, C the clip norm.

    They come by coins of the rate that the ledger counts: always, where nothing is amplified.
    ``observed`` (rounds, count): the cosine of each with the noised update that a round released;
    ``came`` likewise, whether it took part.
    Source: Andrew et al., One-shot Empirical Privacy Estimation for Federated Learning, ICLR 2024,
    algorithm 1.
    """

    count: int
    rate: float
    rng: Rng
    observed: list[list[float]] = field(default_factory=list)
    came: list[list[bool]] = field(default_factory=list)

    def uploads(self, round_: int, part: Weights, norm: float) -> list[Arrays]:
        """Return the uploads of those that take part in a round, in order."""
        coins = self.rng.child("coins", round_).numpy().random(self.count) < self.rate
        self.came.append([bool(c) for c in coins])
        return [self._upload(j, part, norm) for j in np.flatnonzero(coins).tolist()]

    def observe(self, part: Weights, released: Arrays) -> None:
        """Note the cosine of every canary with the update that was released."""
        self.observed.append(self.cosines(part, released))

    def cosines(self, part: Weights, weights: Arrays) -> list[float]:
        """Return the cosine of every canary with ``weights - reference``; 0 for no update."""
        update = flat(part, weights) - flat(part, part.reference)
        length = float(np.linalg.norm(update))
        if not length:
            return [0.0] * self.count
        return [float(self._direction(j, part) @ update) / length for j in range(self.count)]

    def _upload(self, j: int, part: Weights, norm: float) -> Arrays:
        update, start = norm * self._direction(j, part), 0
        made = dict(part.reference)
        for key in keys(part):
            base = part.reference[key]
            piece = update[start : start + base.size].reshape(base.shape)
            made[key] = base.astype(np.float64) + piece
            start += base.size
        return made

    def _direction(self, j: int, part: Weights) -> np.ndarray:
        size = sum(part.reference[key].size for key in keys(part))
        drawn = self.rng.child("direction", j).numpy().standard_normal(size)
        return drawn / np.linalg.norm(drawn)


def keys(part: Weights) -> Sequence[str]:
    """Return the keys that carry an update, in the order of the vector."""
    return sorted(k for k, a in part.reference.items() if np.issubdtype(a.dtype, np.floating))


def flat(part: Weights, weights: Arrays) -> np.ndarray:
    """Return the arrays of a part as one vector (D,), float64."""
    return np.concatenate([weights[key].astype(np.float64).ravel() for key in keys(part)])
