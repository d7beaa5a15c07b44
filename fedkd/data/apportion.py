"""Whole numbers from proportions: how many examples of which class go to which client.

Partitions decide on counts first and on examples last, because counts are cheap to draw again
and can be repaired in a bounded number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedkd.errors import ConfigError
from fedkd.rng import Rng

DRAWS = 100


def label_counts(parts: Sequence[np.ndarray], labels: np.ndarray, classes: int) -> np.ndarray:
    """Return how often each class occurs in each part: int64 ``(parts, classes)``."""
    rows = [np.bincount(labels[part], minlength=classes) for part in parts]
    return np.stack(rows).astype(np.int64)


def apportion(weights: np.ndarray, total: int, rng: Rng) -> np.ndarray:
    """Divide ``total`` in proportion to ``weights`` into whole numbers by largest remainder.

    Each share differs from ``total * weights / sum(weights)`` by less than one. Equal remainders
    are ranked by ``rng``, since any fixed rule would favour the same clients for every class.

    >>> apportion(np.array([1.0, 1.0, 2.0]), 8, Rng(0))
    array([2, 2, 4])
    >>> apportion(np.array([1.0, 0.0, 1e-9]), 3, Rng(0))
    array([3, 0, 0])
    """
    exact = total * (weights / weights.sum())
    shares = np.floor(exact).astype(np.int64)
    remainder = exact - shares
    order = np.lexsort((rng.numpy().random(len(weights)), -np.round(remainder, 9)))
    shares[order[: total - int(shares.sum())]] += 1
    return shares


def check_request(examples: int, clients: int, minimum: int) -> None:
    """Raise :class:`ConfigError` where ``examples`` cannot give each client ``minimum`` of them."""
    if clients < 1:
        raise ConfigError(f"clients = {clients}: at least 1 is needed")
    if clients * minimum > examples:
        most, fewest = examples // max(minimum, 1), examples // clients
        smaller = f", or min_examples to at most {fewest}" if 1 <= fewest < minimum else ""
        raise ConfigError(
            f"clients = {clients} with at least {minimum} training examples each need "
            f"{clients * minimum}, but there are {examples}; lower clients to at most {most}"
            f"{smaller}"
        )


def settle(draw: Callable[[Rng], np.ndarray], minimum: int, rng: Rng) -> np.ndarray:
    """Draw counts ``(clients, classes)`` until each client has ``minimum``, at most 100 times.

    If no draw does, the one that lacks fewest is repaired by :func:`fill`. Drawing again favours
    even partitions a little, as it does in everybody's code that sets a minimum.
    """
    best, lacking = draw(rng.child("draw", 0)), 0
    for attempt in range(DRAWS):
        counts = best if attempt == 0 else draw(rng.child("draw", attempt))
        lack = int(np.maximum(minimum - counts.sum(1), 0).sum())
        if lack == 0:
            return counts
        if attempt == 0 or lack < lacking:
            best, lacking = counts, lack
    return fill(best, minimum)


def fill(counts: np.ndarray, minimum: int) -> np.ndarray:
    """Raise every client to ``minimum`` by taking from the largest one, of its largest class.

    Each step satisfies a client, brings the giver down to the minimum or uses up one of its
    classes, so there are at most ``clients * (classes + 2)`` steps.

    >>> fill(np.array([[0, 0], [9, 3]]), 2)
    array([[2, 0],
           [7, 3]])
    """
    counts = counts.copy()
    for needy in np.flatnonzero(counts.sum(1) < minimum):
        need = minimum - int(counts[needy].sum())
        while need > 0:
            giver = int(counts.sum(1).argmax())
            c = int(counts[giver].argmax())
            moved = min(need, int(counts[giver, c]), int(counts[giver].sum()) - minimum)
            if moved <= 0:
                raise ConfigError(
                    f"min_examples = {minimum}: there are not enough examples for "
                    f"{len(counts)} clients; lower min_examples or clients"
                )
            counts[giver, c] -= moved
            counts[needy, c] += moved
            need -= moved
    return counts
