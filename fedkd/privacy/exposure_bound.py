"""What differential privacy allows canaries to show: the curve that every exposure is held against.

An exposure of t bits is a membership attack that fires with false-positive rate 2^-t, so the
hypothesis-testing bound of the mechanism is a bound on exposure (Jagielski, 2306.00133).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fedkd.errors import ConfigError


def bound(t: ArrayLike, epsilon: float, delta: float, copies: int = 1) -> np.ndarray:
    """Return the most that P[exposure >= t] can be under (epsilon, delta)-DP, per t in bits.

    min(1, e^(k epsilon) 2^-t + delta_k), delta_k = delta (e^(k epsilon) - 1) / (e^epsilon - 1) by
    group privacy. k = ``copies`` counts units of that DP: under example-level DP the copies with
    all holders together; under client-level DP the holders, whatever their copies. Without the
    canary its rank is uniform, so P[exposure >= t] <= 2^-t. The probability is over secret and
    training; it holds for ranks, and for extrapolation as far as its fit does. epsilon = inf
    gives 1.

    Raises:
        ConfigError: epsilon below 0, delta outside [0, 1], ``copies`` no whole number above 0.

    >>> bound([0, 6.64386, 20], 0.0, 0.0).round(4).tolist()
    [1.0, 0.01, 0.0]
    """
    group, slack = _group(epsilon, delta, copies)
    bits = np.asarray(t, dtype=np.float64)
    if np.isnan(bits).any():
        raise ConfigError("t holds NaN: give exposures in bits")
    if group == math.inf:
        return np.ones_like(bits)
    # An exponent above 0 is a probability above 1.
    return np.minimum(1.0, np.exp(np.minimum(group - bits * math.log(2), 0.0)) + slack)


def level_at(epsilon: float, delta: float, probability: float = 0.01, copies: int = 1) -> float:
    """Return the exposure t, in bits, that :func:`bound` lets ``probability`` of canaries reach.

    (k epsilon - ln(probability - delta_k)) / ln 2; inf where no exposure is that unlikely: epsilon
    is inf, or delta_k is not below ``probability``.

    Raises:
        ConfigError: as :func:`bound`; ``probability`` is not in (0, 1].

    >>> round(level_at(1.0, 0.0), 2), round(level_at(8.0, 0.0), 2)
    (8.09, 18.19)
    """
    if not 0 < probability <= 1:
        raise ConfigError(f"probability = {probability!r}: must lie in (0, 1], for instance 0.01")
    group, slack = _group(epsilon, delta, copies)
    if group == math.inf or slack >= probability:
        return math.inf
    return (group - math.log(probability - slack)) / math.log(2)


def _group(epsilon: float, delta: float, copies: int) -> tuple[float, float]:
    """Return (k epsilon, delta_k) for k copies."""
    if not epsilon >= 0:
        raise ConfigError(f"epsilon = {epsilon!r}: must be 0 or more (inf: no privacy)")
    if not 0 <= delta <= 1:
        raise ConfigError(f"delta = {delta!r}: must lie in [0, 1]")
    if copies != int(copies) or copies < 1:
        raise ConfigError(f"copies = {copies!r}: must be a whole number, 1 or more")
    if epsilon == math.inf or not delta:
        return copies * epsilon, 0.0
    if epsilon * (copies - 1) > 700:
        return copies * epsilon, math.inf
    # The quotient of two expm1 overflows where this does not; its limit at epsilon = 0 is k.
    shrink = math.expm1(-copies * epsilon) / math.expm1(-epsilon) if epsilon else copies
    return copies * epsilon, delta * math.exp((copies - 1) * epsilon) * shrink
