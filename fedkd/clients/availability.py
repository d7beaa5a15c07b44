"""Which clients are there to be asked: all, few often and many rarely, or as their data have it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkd.rng import stream


def power_law(exponent: float, seed: int, clients: Sequence[int]) -> np.ndarray:
    """Return for each client the probability ``r^-exponent`` with which it is there, (N,).

    r = 1..N is its place in one random order of the seed: independent of its data, of rounds and of
    ratios. Limits: exponent 0 is everybody always; the client of rank 1 always is there.
    """
    place = np.array([stream(seed, "availability", "rank", k).uniform() for k in clients])
    ranks = np.argsort(np.argsort(place)) + 1
    return np.asarray(ranks.astype(float) ** -exponent)


def by_label(shares: np.ndarray, strength: float, period: int, round_: int) -> np.ndarray:
    """Return for each client the probability with which it is there, (N,): the adversary.

    ``1 - strength (1 - s)``, s the share of its training examples (``shares``, (N, C)) whose class
    is in the window of round t: the ``max(1, C // 2)`` classes from ``floor(C (t - 1) / period)``
    on, modulo C. So the data of a round are of half of the classes, and drift once through all of
    them in ``period`` rounds.

    The formula is ours; its relative is Eichner, Koren, McMahan, Srebro and Talwar, "Semi-Cyclic
    Stochastic Gradient Descent", ICML 2019, where blocks of clients with different distributions
    are there at different times of a day. Limits: strength 0 is everybody always; with equal shares
    of all classes everybody has the same probability in every round.
    """
    classes = shares.shape[1]
    first = classes * (round_ - 1) // period
    window = (first + np.arange(max(1, classes // 2))) % classes
    return np.asarray(1.0 - strength * (1.0 - shares[:, window].sum(1)))


def label_shares(counts: np.ndarray) -> np.ndarray:
    """Return the share of each class in a client's examples, (N, C); 0 where it has none."""
    return np.asarray(counts / np.maximum(counts.sum(1, keepdims=True), 1))


def there(chance: np.ndarray, seed: int, round_: int, clients: Sequence[int]) -> list[int]:
    """Return the clients that are there in a round, each with its own ``chance``, (N,).

    Each tosses a coin of its own, on a stream apart from that of cohorts: a client that is there at
    one ratio is there at every other.
    """
    coins = (stream(seed, "availability", round_, k).uniform() for k in clients)
    return [k for k, coin, p in zip(clients, coins, chance.tolist(), strict=True) if coin < p]
