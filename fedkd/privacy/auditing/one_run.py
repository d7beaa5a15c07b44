"""Epsilon from one run with many canaries, each in or out by its own fair coin.

Whoever guesses coins of an (epsilon, 0)-DP mechanism is right with odds of at most e^epsilon each,
whatever the canaries do to each other, so that one run replaces thousands (Steinke, Nasr and
Jagielski, NeurIPS 2023).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from fedkd.errors import ConfigError
from fedkd.privacy.auditing.bound import Bound, bound, geometric, largest, scores
from fedkd.privacy.auditing.clopper_pearson import lower

METHOD = "one-run"
FEWEST = 7
"""Fewer right guesses than this cannot be told from luck after the correction for the search."""


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of ``v`` or more right of ``r`` guesses on ``m`` canaries.

    beta + 2 m delta alpha, with B ~ Binomial(r, 1 / (1 + e^-epsilon)), beta = P[B >= v] and
    alpha = max over 1 <= i <= v of P[v > B >= v - i] / i (the paper's bound for approximate DP).

    >>> round(p_value(1000, 100, 95, 2.0, 1e-5), 7)
    0.0178246
    """
    odds = special.expit(epsilon)
    beta = float(_at_least(v, r, odds))
    if delta == 0 or v == 0:
        return beta
    alpha, done = 0.0, 0
    while done < v and alpha * (done + 1) < 1:  # no later i can give more than 1 / i
        i = np.arange(done + 1, min(v, 2 * done + 64) + 1)
        alpha = max(alpha, float(np.max((_at_least(v - i, r, odds) - beta) / i)))
        done = int(i[-1])
    return min(beta + 2 * m * delta * alpha, 1.0)


@functools.lru_cache(maxsize=65536)
def lower_bound(m: int, r: int, v: int, p: float, delta: float) -> float:
    """Return the largest epsilon that ``v`` right of ``r`` guesses refute at significance ``p``.

    It is refuted itself, and with it all below, so that the search cannot end too high; 0 where
    nothing is.

    >>> round(lower_bound(1000, 100, 100, 0.05, 1e-5), 5)
    3.46538
    """
    if not 0 <= v <= r <= m:
        raise ConfigError(f"{v} right of {r} guesses on {m} canaries is impossible")
    if r == 0:
        return 0.0
    return largest(lambda epsilon: p_value(m, r, v, epsilon, delta) < p, 1e-9)


def guesses(m: int) -> list[tuple[int, int]]:
    """Return which numbers (k+, k-) of guesses "in" and "out" are tried on ``m`` canaries.

    Equal numbers of both, or one kind only, geometric from half of the canaries less two standard
    deviations of the coins: with more, even a perfect attack is wrong when coins fall unevenly.
    They follow from ``m`` alone, not from scores or coins.
    """
    most = math.floor(m / 2 - math.sqrt(m))
    found = [(k, k) for k in geometric(most, (FEWEST + 1) // 2, 2.0)]
    single = geometric(most, FEWEST, 2.0)
    return found + [(k, 0) for k in single] + [(0, k) for k in single]


def counts(
    inside: np.ndarray, outside: np.ndarray, tried: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return (guesses, right ones) for every (k+, k-): "in" for the top, "out" for the bottom.

    Equal scores are never divided, for which side of a cut they lie on would be a matter of order
    or of coins: the cut moves to the nearer end of them, to fewer guesses if both are as near.
    Both arrays ascend.
    """
    pooled = np.sort(np.concatenate([inside, outside]))
    m = pooled.size
    edges = np.concatenate([[0], np.flatnonzero(pooled[1:] != pooled[:-1]) + 1, [m]])
    # Sums of members in ascending order of score, at the ends of equal scores alone.
    starts = np.append(pooled[edges[:-1]], np.inf)
    members = np.searchsorted(inside, starts, side="left")
    members[-1] = inside.size
    found = []
    for top, bottom in tried:
        if top < 0 or bottom < 0 or top + bottom > m:
            raise ConfigError(f"guesses ({top}, {bottom}) on {m} canaries: must be 0 to {m} in all")
        high = len(edges) - 1 - int(np.argmin(np.abs(edges[::-1] - (m - top))))
        low = min(int(np.argmin(np.abs(edges - bottom))), high)
        right = inside.size - members[high] + edges[low] - members[low]
        found.append((int(m - edges[high] + edges[low]), int(right)))
    return found


def perfect(
    n_inside: int, n_outside: int, tried: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return (guesses, right ones) of an attack that ranks all inside above all outside."""
    return [(t + b, min(t, n_inside) + min(b, n_outside)) for t, b in tried]


def promising(found: Sequence[tuple[int, int]], p: float) -> list[tuple[int, int]]:
    """Return what was found, best share of right guesses first, so that few need a search."""
    distinct = sorted({pair for pair in found if pair[0]})
    if not distinct:
        return []
    r, v = np.array(distinct).T
    return [distinct[i] for i in np.argsort(-lower(v, r, p), kind="stable")]


def one_run(
    inside: ArrayLike,
    outside: ArrayLike,
    *,
    confidence: float,
    delta: float,
    tried: Sequence[tuple[int, int]] | None = None,
) -> Bound:
    """Return the best bound over numbers of guesses (k+, k-), Bonferroni-corrected over them.

    Canaries may influence each other, unlike where rates of errors are counted. ``tried`` replaces
    :func:`guesses`; it must not follow from the coins.

    Raises:
        DataError: nothing inside or outside, or NaN.
        ConfigError: confidence or delta out of range; more guesses than canaries.
    """
    above, below = scores(inside, outside, confidence, delta)
    m = above.size + below.size
    tried = guesses(m) if tried is None else tried
    p = (1 - confidence) / max(len(tried), 1)
    return bound(
        _best(m, counts(above, below, tried), p, delta),
        _best(m, perfect(above.size, below.size, tried), p, delta),
        m,
        METHOD,
        confidence,
        delta,
        on="every canary was in by its own fair coin",
    )


def _best(m: int, found: Sequence[tuple[int, int]], p: float, delta: float) -> float:
    """Return the best bound; a full search only for what refutes the best one yet."""
    best = 0.0
    for r, v in promising(found, p):
        if v > r * special.expit(best) and p_value(m, r, v, best, delta) < p:
            best = max(best, lower_bound(m, r, v, p, delta))
    return best


def _at_least(v: ArrayLike, r: int, odds: float) -> np.ndarray:
    """Return P[Binomial(r, odds) >= v]."""
    v = np.asarray(v, dtype=np.float64)
    inner = special.betainc(np.maximum(v, 1.0), r - np.maximum(v, 1.0) + 1, odds)
    return np.where(v > 0, inner, 1.0)
