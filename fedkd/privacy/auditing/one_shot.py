"""Empirical epsilon of a federation that exchanges weights, from a few clients of random direction.

In high dimension a random direction is nearly orthogonal to a model that never saw it, so that the
null needs no runs: its cosine is N(0, 1 / d) (Andrew et al., ICLR 2024, "One-shot").
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from fedkd.errors import ConfigError, DataError
from fedkd.privacy.accounting import gaussian_epsilon
from fedkd.privacy.auditing.bound import Bound, bound, check, geometric

LEAST_DIMENSION = 1000


def one_shot(
    cosines: ArrayLike, dimension: int, delta: float, confidence: float = 0.95
) -> dict[str, Any]:
    """Return ``estimate`` and ``lower`` (both :class:`Bound`), ``mean``, ``std`` of the cosines.

    ``cosines`` (k,): of each random direction with the final change of the model. The estimate is
    the epsilon between N(0, 1 / d) and the Gaussian fitted to them: right for a Gaussian mechanism
    and many directions, too high for few (their fitted spread is never exact: by a fifth for 100),
    certified for none. ``lower``: log((TPR_low - delta) / FPR) at thresholds geometric in rank
    among the cosines, with FPR in closed form, which hence may lie far below 1 / k, and Jeffreys'
    one-sided limit of TPR, Bonferroni-corrected over thresholds.

    Raises:
        DataError: fewer than 2 cosines, equal ones, NaN or beyond -1 to 1.
        ConfigError: a dimension below 1,000, where the null is not normal enough; delta not in
            (0, 1); a confidence not in (0, 1).
    """
    check(confidence, delta, gaussian=True)
    if dimension < LEAST_DIMENSION:
        raise ConfigError(
            f"one-shot audit: {dimension} weights are exchanged; random directions need at least "
            f"{LEAST_DIMENSION} for the closed-form null; take a larger model, or audit by "
            "canaries alone (canaries.random_clients = 0)"
        )
    values = np.sort(np.asarray(cosines, dtype=np.float64))
    if values.ndim != 1 or values.size < 2 or not np.all(np.abs(values) <= 1 + 1e-6):
        raise DataError(
            f"one-shot audit: needs at least 2 cosines between -1 and 1, got {values.size} from "
            f"{values.min(initial=math.inf):.3g} to {values.max(initial=-math.inf):.3g}; "
            "raise canaries.random_clients, or look why the model diverged"
        )
    mean, std = float(values.mean()), float(values.std(ddof=1))
    if std == 0:
        raise DataError("one-shot audit: all cosines are equal; give each client its own direction")
    estimate = Bound(
        epsilon_two_gaussians(0.0, dimension**-0.5, mean, std, delta),
        math.inf,
        "one-shot estimate",
        0.0,
        delta,
        values.size,
        "an estimate, not a certified bound; a Gaussian mechanism, and too high for few directions",
    )
    lower = _lower(values, dimension, delta, confidence)
    return {"estimate": estimate, "lower": lower, "mean": mean, "std": std}


def epsilon_two_gaussians(mu0: float, s0: float, mu1: float, s1: float, delta: float) -> float:
    """Return the least epsilon at which N(mu0, s0^2) and N(mu1, s1^2) are indistinguishable.

    Both directions: P(A) <= e^epsilon Q(A) + delta and the reverse for all A. Equal standard
    deviations are the Gaussian mechanism with mu = |mu1 - mu0| / s.

    Raises:
        ConfigError: a standard deviation that is not above 0, or delta not in (0, 1).

    >>> round(epsilon_two_gaussians(0.0, 1.0, 1.0, 1.0, 1e-5), 4)
    4.3772
    """
    check(0.5, delta, gaussian=True)
    if not (0 < s0 < math.inf and 0 < s1 < math.inf and math.isfinite(mu0 - mu1)):
        raise ConfigError(f"N({mu0}, {s0}^2), N({mu1}, {s1}^2): finite, with deviations above 0")
    shift, ratio = (mu1 - mu0) / s0, s1 / s0
    if abs(ratio - 1) < 1e-9:
        return gaussian_epsilon(abs(shift), delta)
    pairs = ((shift, ratio), (-shift / ratio, 1 / ratio))
    return max(_epsilon(mean, std, delta) for mean, std in pairs)


def _epsilon(mean: float, std: float, delta: float) -> float:
    """Return the least epsilon with sup_A P(A) - e^epsilon Q(A) <= delta, Q standard normal."""
    if _delta(mean, std, 0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while _delta(mean, std, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(mean, std, middle) > delta else (low, middle)
    return high


def _delta(mean: float, std: float, epsilon: float) -> float:
    """Return P(A) - e^epsilon Q(A) of A = {log dP/dQ > epsilon}: outside or between two roots."""
    a = (1 - std**-2) / 2
    b, c = mean / std**2, -math.log(std) - (mean / std) ** 2 / 2 - epsilon
    square = b * b - 4 * a * c
    if square <= 0:
        return max(0.0, -math.expm1(epsilon)) if a > 0 else 0.0
    half = -(b + math.copysign(math.sqrt(square), b)) / 2
    low, high = sorted((half / a, c / half))
    logs = []
    for m, s in ((mean, std), (0.0, 1.0)):
        x, y = (low - m) / s, (high - m) / s
        logs.append(_outside(x, y) if a > 0 else _between(x, y))
    return math.exp(logs[0]) - math.exp(min(epsilon + logs[1], logs[0]))


def _outside(x: float, y: float) -> float:
    return float(np.logaddexp(special.log_ndtr(x), special.log_ndtr(-y)))


def _between(x: float, y: float) -> float:
    """Return log P[x < N(0, 1) < y], from the nearer tail so that no digits cancel."""
    if x + y > 0:
        x, y = -y, -x
    high, low = float(special.log_ndtr(y)), float(special.log_ndtr(x))
    return high + math.log1p(-math.exp(low - high)) if low < high else -math.inf


def _lower(values: np.ndarray, dimension: int, delta: float, confidence: float) -> Bound:
    """Return Jeffreys' bound; what equals a threshold counts as missed."""
    k = values.size
    j = np.array(geometric(k))
    significance = (1 - confidence) / j.size

    def best(above: np.ndarray, at: np.ndarray) -> float:
        tpr = special.betaincinv(above + 0.5, k - above + 0.5, significance) - delta
        fpr = special.log_ndtr(-at * math.sqrt(dimension))
        # Where delta alone allows as many, a threshold says nothing, however small its FPR.
        return float(np.max(np.log(tpr[tpr > 0]) - fpr[tpr > 0], initial=0.0))

    return bound(
        best(j - 1, values[k - j]),
        best(np.array([k]), np.array([1.0])),
        k,
        "one-shot",
        confidence,
        delta,
        on="random directions are independent, their cosines without the client are N(0, 1/d)",
    )
