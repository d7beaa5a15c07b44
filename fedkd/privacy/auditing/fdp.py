"""About twice the one-run bound, where the trade-off curve of the mechanism is Gaussian.

The one-run argument for a whole trade-off curve in place of one (epsilon, delta) uses all of what
a mechanism allows (Mahloujifar, Melis and Chaudhuri, ICML 2025).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from fedkd.errors import ConfigError
from fedkd.privacy.accounting import gaussian_epsilon
from fedkd.privacy.auditing.bound import Bound, bound, largest, scores
from fedkd.privacy.auditing.one_run import counts, guesses, perfect, promising

METHOD = "one-run-fdp"


def rejects(mu: float, m: int, r: int, v: int, p: float) -> bool:
    """Return whether ``v`` or more right of ``r`` guesses are less likely than ``p`` under mu-GDP.

    Let p_i be the probability of i right guesses, R_j and W_j the sums over i >= j of i p_i / m
    and (r - i) p_i / m. The curve demands W_{j-1} >= Phi(Phi^-1(R_j) - mu) for all j. From
    R_v = p v / m and W_v = p (r - v) / m on, the least sums are built downwards; were they above
    r / m, probabilities would add up to more than 1.
    """
    right, wrong, most = p * v / m, p * (r - v) / m, r / m
    for i in range(v - 1, -1, -1):
        least = float(ndtr(ndtri(right) - mu))
        if least <= wrong:
            break  # right stays as it is, and so does all that follows from it.
        right = min(right + i / (r - i) * (least - wrong), 1.0)
        wrong = least
        if right + wrong > most:
            return True
    return right + wrong > most


@functools.lru_cache(maxsize=65536)
def lower_bound(m: int, r: int, v: int, p: float) -> float:
    """Return the largest mu that ``v`` right of ``r`` guesses on ``m`` canaries refute; 0 if none.

    Refuting a mu refutes all below.
    """
    if not 0 <= v <= r <= m:
        raise ConfigError(f"{v} right of {r} guesses on {m} canaries is impossible")
    return largest(lambda mu: rejects(mu, m, r, v, p), 1e-8)


def one_run_fdp(
    inside: ArrayLike,
    outside: ArrayLike,
    *,
    confidence: float,
    delta: float,
    tried: Sequence[tuple[int, int]] | None = None,
) -> Bound:
    """Return the epsilon at ``delta`` of the largest mu that the guesses of one run refute.

    Guesses and their correction are those of :func:`fedkd.privacy.auditing.one_run.one_run`.
    Valid only where the trade-off curve is Gaussian: that no mu-GDP holds says nothing of epsilon
    for other curves.

    Raises:
        DataError: nothing inside or outside, or NaN.
        ConfigError: confidence or delta out of range, or delta 0; more guesses than canaries.
    """
    above, below = scores(inside, outside, confidence, delta, gaussian=True)
    m = above.size + below.size
    tried = guesses(m) if tried is None else tried
    p = (1 - confidence) / max(len(tried), 1)
    found = _best(m, counts(above, below, tried), p)
    most = _best(m, perfect(above.size, below.size, tried), p)
    return bound(
        gaussian_epsilon(found, delta),
        gaussian_epsilon(most, delta),
        m,
        METHOD,
        confidence,
        delta,
        on="the trade-off curve is Gaussian, every canary was in by its own fair coin",
    )


def _best(m: int, found: Sequence[tuple[int, int]], p: float) -> float:
    """Return the best mu; a full search only for what refutes the best one yet."""
    best = 0.0
    for r, v in promising(found, p):
        if 2 * v > r and rejects(best, m, r, v, p):
            best = max(best, lower_bound(m, r, v, p))
    return best
