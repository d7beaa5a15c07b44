"""Every reported mean gets an interval; the unit that is counted as independent decides which.

Seeds: Student's t. Two methods on the same seeds: paired t. Clients of one run: bootstrap.
Successes of independent trials: Clopper and Pearson.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from fedkd.metrics.checks import finite, same_length
from fedkd.rng import Rng
from fedkd.types import Estimate


def mean_t(values: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the mean with Student's t interval ``mean ± t_{n-1} s / sqrt(n)``, s with n - 1.

    For independent, roughly normal values, such as one number a seed. One value has no interval
    (NaN bounds); equal values have one of width 0.

    Raises:
        ValueError: ``confidence`` is not in (0, 1); no values, or values that are not finite.

    >>> print(mean_t([0.80, 0.82, 0.84]))
    0.82 [0.7703, 0.8697] (n=3, Student t 95%)
    >>> print(mean_t([0.8]))
    0.8 (n=1, no interval)
    """
    return _t(finite(values), confidence, "Student t")


def paired_t(a: ArrayLike, b: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the mean of ``a - b`` with Student's t interval; position i of both is one seed.

    What the seeds share (partition, initial network, cohorts) cancels, so this interval is
    usually far narrower than those of the two means. It excludes 0 when the difference is
    significant at level ``1 - confidence``.

    Raises:
        ValueError: lengths differ, and as :func:`mean_t`.

    >>> print(paired_t([0.83, 0.74, 0.91], [0.80, 0.72, 0.89]))
    0.02333 [0.008991, 0.03768] (n=3, paired t 95%)
    """
    first, second = finite(a, "values of a"), finite(b, "values of b")
    same_length(first, second, "values of a and b")
    return _t(first - second, confidence, "paired t")


def bootstrap_mean(
    values: ArrayLike, rng: Rng, confidence: float = 0.95, resamples: int = 2000
) -> Estimate:
    """Return the mean with the BCa bootstrap interval; makes no assumption of normality.

    For the clients of one run, whose accuracies are skewed and bounded; it then says how the mean
    would vary with other clients, not with other seeds. One value has no interval (NaN bounds);
    equal values have one of width 0. Efron (JASA 1987), "bias-corrected and accelerated".

    Raises:
        ValueError: ``confidence`` is not in (0, 1), ``resamples < 1``; no values, or not finite.

    >>> print(bootstrap_mean([0.2, 0.7, 0.8, 0.9, 0.9], Rng(0)))
    0.7 [0.32, 0.86] (n=5, BCa bootstrap 95%)
    """
    array, method = finite(values), _method("BCa bootstrap", confidence)
    if resamples < 1:
        raise ValueError(f"resamples = {resamples} must be at least 1")
    n, mean = array.size, float(array.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1, method)
    if np.ptp(array) == 0:
        return Estimate(mean, mean, mean, n, method)
    means = array[rng.numpy().integers(n, size=(resamples, n))].mean(axis=1)
    low, high = np.quantile(means, _bca_levels(array, means, confidence))
    return Estimate(mean, float(low), float(high), n, method)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Return the fraction ``successes / n`` with the exact binomial interval.

    It covers the true probability at least as often as it says, for every n, and is not empty at
    0 or n successes. Clopper and Pearson (Biometrika 1934).

    Raises:
        ValueError: not ``0 <= successes <= n`` with ``n >= 1``; ``confidence`` is not in (0, 1).

    >>> print(clopper_pearson(0, 20))
    0 [0, 0.1684] (n=20, Clopper-Pearson 95%)
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials is impossible")
    method = _method("Clopper-Pearson", confidence)
    tail = (1 - confidence) / 2
    low = stats.beta.ppf(tail, successes, n - successes + 1) if successes else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, n - successes) if successes < n else 1.0
    return Estimate(successes / n, float(low), float(high), n, method)


def _t(array: np.ndarray, confidence: float, name: str) -> Estimate:
    method = _method(name, confidence)
    n, mean = array.size, float(array.mean())
    if n == 1:
        return Estimate(mean, math.nan, math.nan, 1, method)
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n, method)


def _bca_levels(array: np.ndarray, means: np.ndarray, confidence: float) -> np.ndarray:
    """Return which quantiles of the resampled means are the bounds."""
    scale = np.ptp(array)
    away, shift = (array - array.mean()) / scale, (means - array.mean()) / scale
    # Ties with the mean count half: means of few values often tie, up to rounding.
    below = (np.mean(shift < -1e-12) + np.mean(shift <= 1e-12)) / 2
    edge = 0.5 / means.size
    bias = special.ndtri(np.clip(below, edge, 1 - edge))
    acceleration = (away**3).sum() / (6 * (away**2).sum() ** 1.5)
    tail = special.ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    return special.ndtr(bias + (bias + tail) / (1 - acceleration * (bias + tail)))


def _method(name: str, confidence: float) -> str:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must be between 0 and 1, for instance 0.95")
    return f"{name} {100 * confidence:g}%"
