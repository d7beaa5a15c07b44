"""Epsilon from the error rates of one attack: the classic bound, for many independent canaries.

An (epsilon, delta)-DP mechanism allows TPR <= e^epsilon FPR + delta at every threshold; exact
intervals of both rates turn counts into a bound (Jagielski et al., NeurIPS 2020).
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from fedkd.privacy.auditing.bound import Bound, bound, geometric, scores

METHOD = "clopper-pearson"


def upper(successes: ArrayLike, n: ArrayLike, significance: float) -> np.ndarray:
    """Return the one-sided upper limit of a probability after ``successes`` of ``n``; 1 for all."""
    k, n = np.asarray(successes), np.asarray(n)
    # A parameter of 0 gives NaN, so that k = n is asked as k = n - 1 and thrown away.
    inner = special.betainccinv(np.minimum(k, n - 1) + 1, np.maximum(n - k, 1), significance)
    return np.where(k < n, inner, 1.0)


def lower(successes: ArrayLike, n: ArrayLike, significance: float) -> np.ndarray:
    """Return the one-sided lower limit of a probability after ``successes`` of ``n``; 0 for none.

    >>> float(lower(20, 20, 0.025).round(4))
    0.8316
    """
    return 1 - upper(np.asarray(n) - np.asarray(successes), n, significance)


def epsilon(
    true_positives: ArrayLike,
    n_inside: int,
    false_positives: ArrayLike,
    n_outside: int,
    significance: float,
    delta: float = 0.0,
) -> np.ndarray:
    """Return max(0, log((TPR_low - delta) / FPR_high)) of one threshold, or of each given.

    Each rate gets half of ``significance``. The threshold must be fixed beforehand.

    >>> float(epsilon(100, 100, 0, 100, 0.05).round(3))
    3.281
    """
    tpr = lower(true_positives, n_inside, significance / 2) - delta
    fpr = upper(false_positives, n_outside, significance / 2)
    return np.log(np.maximum(tpr, fpr) / fpr)


def thresholds(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (true positives, false positives) at thresholds that a correction can account for.

    Threshold j is the j-th largest score outside, for j in a geometric sequence; positive is what
    lies strictly above. Its FPR then has at most the law of the j-th order statistic of uniform
    numbers, Beta(j, n - j + 1), whose quantile is the upper limit at j - 1 successes, exactly;
    TPR given the threshold is binomial, since scores inside had no part in it. Equal scores only
    lower the counts. Both arrays of scores ascend.
    """
    j = np.array(geometric(outside.size))
    at = outside[outside.size - j]
    return inside.size - np.searchsorted(inside, at, side="right"), j - 1


def clopper_pearson(
    inside: ArrayLike, outside: ArrayLike, *, confidence: float = 0.95, delta: float = 0.0
) -> Bound:
    """Return the bound by the error rates of the best threshold, in both directions.

    Guesses "in" above thresholds from the scores outside, and "out" below thresholds from the
    scores inside, both geometric in rank. Bonferroni: significance / (2 x number of thresholds)
    for every rate. Takes scores of any order; they must be independent of each other, which many
    canaries of one run are only roughly.

    Raises:
        DataError: nothing inside or outside, or NaN.
        ConfigError: confidence or delta out of range.
    """
    above, below = scores(inside, outside, confidence, delta)
    mirrored = (-below)[::-1], (-above)[::-1]
    tests = len(geometric(above.size)) + len(geometric(below.size))
    significance = (1 - confidence) / tests
    best = 0.0
    for high, low in ((above, below), mirrored):
        tp, fp = thresholds(high, low)
        found = epsilon(tp, high.size, fp, low.size, significance, delta)
        best = max(best, float(found.max()))
    return bound(
        best,
        ceiling(above.size, below.size, significance, delta),
        above.size + below.size,
        METHOD,
        confidence,
        delta,
        on="scores of different canaries are independent",
    )


@functools.lru_cache(maxsize=1024)
def ceiling(n_inside: int, n_outside: int, significance: float, delta: float = 0.0) -> float:
    """Return what a perfect attack certifies: all right, no mistake; either direction.

    >>> round(ceiling(500, 500, 0.05), 3)
    4.906
    """
    both = (
        epsilon(n_inside, n_inside, 0, n_outside, significance, delta),
        epsilon(n_outside, n_outside, 0, n_inside, significance, delta),
    )
    return float(max(both))
