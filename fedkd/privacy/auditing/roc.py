"""How well an attack tells canaries apart: where it counts, at few false alarms.

A mean over all canaries hides that a few are certain; the curve, TPR at 1 % and 0.1 % FPR and the
area say both (Carlini et al., IEEE S&P 2022). Scores: higher means more likely in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from fedkd.errors import ConfigError
from fedkd.metrics.intervals import clopper_pearson
from fedkd.privacy.auditing.bound import scores
from fedkd.types import Estimate


@dataclass(frozen=True, eq=False)
class Roc:
    """Corners of the curve from (0, 0) to (1, 1): ``fpr`` and ``tpr`` never fall.

    Corners stand at distinct scores only: equal ones are one step, along both axes.
    """

    fpr: np.ndarray
    tpr: np.ndarray

    def hull(self) -> Roc:
        """Return the upper convex hull: what attacks that toss coins between thresholds reach."""
        keep: list[int] = []
        for i in range(self.fpr.size):
            # Rates are rounded, so that three in line may seem to bend by about 1e-16.
            while len(keep) > 1 and self._cross(keep[-2], keep[-1], i) > -1e-13:
                keep.pop()
            keep.append(i)
        return Roc(self.fpr[keep], self.tpr[keep])

    def area(self) -> float:
        """Return the area below, by trapezoids: of the curve itself P[in > out] + P[tie] / 2."""
        return float(np.sum(np.diff(self.fpr) * (self.tpr[1:] + self.tpr[:-1]) / 2))

    def at(self, fpr: ArrayLike) -> np.ndarray:
        """Return the TPR at each FPR, on the lines between corners, the best where they rise."""
        last = np.append(np.diff(self.fpr) > 0, True)
        return np.interp(np.asarray(fpr, dtype=np.float64), self.fpr[last], self.tpr[last])

    def _cross(self, a: int, b: int, c: int) -> float:
        x, y = self.fpr, self.tpr
        return float((x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]))


def roc(inside: ArrayLike, outside: ArrayLike) -> Roc:
    """Return the curve of all thresholds, "in" at or above each.

    Raises:
        DataError: nothing inside or outside, or NaN.

    >>> roc([1, 3], [0, 2]).tpr.tolist()
    [0.0, 0.5, 0.5, 1.0, 1.0]
    """
    above, below = scores(inside, outside, 0.5, 0.0)
    at = np.union1d(above, below)[::-1]
    tpr, fpr = (1 - np.searchsorted(x, at, side="left") / x.size for x in (above, below))
    return Roc(np.append(0.0, fpr), np.append(0.0, tpr))


def auc(inside: ArrayLike, outside: ArrayLike, confidence: float = 0.95) -> Estimate:
    """Return the area P[in > out] + P[tie] / 2 with DeLong's interval on the logit scale.

    On that scale it stays within 0 and 1. At exactly 0 or 1, where no variance can be estimated,
    Clopper and Pearson's interval for the smaller of both groups stands in. A single score on one
    side has no interval. DeLong et al. (Biometrics 1988).

    Raises:
        DataError: nothing inside or outside, or NaN.
        ConfigError: a confidence outside (0, 1).
    """
    above, below = scores(inside, outside, confidence, 0.0)
    wins_in = _wins(above, below)
    wins_out = 1 - _wins(below, above)
    area, fewer = float(wins_in.mean()), min(above.size, below.size)
    n = above.size + below.size
    if area in (0.0, 1.0):
        exact = clopper_pearson(round(area) * fewer, fewer, confidence)
        return Estimate(area, exact.low, exact.high, n, exact.method)
    method = f"DeLong, logit {100 * confidence:g}%"
    if fewer < 2:
        return Estimate(area, math.nan, math.nan, n, method)
    variance = wins_in.var(ddof=1) / above.size + wins_out.var(ddof=1) / below.size
    half = special.ndtri((1 + confidence) / 2) * math.sqrt(variance) / (area * (1 - area))
    low, high = special.expit(special.logit(area) + np.array([-half, half]))
    return Estimate(area, float(low), float(high), n, method)


def tpr_at(inside: ArrayLike, outside: ArrayLike, fpr: float, confidence: float = 0.95) -> Estimate:
    """Return the TPR at the lowest threshold that no more than ``fpr`` of the scores outside beat.

    "In" is what lies strictly above, so that equal scores count against the attack. The interval
    is that of the TPR at this threshold (Clopper and Pearson); the FPR there is itself measured.
    An FPR below 1 / len(outside) cannot be resolved: it is then the TPR above all outside, and
    ``method`` says so.

    Raises:
        DataError: nothing inside or outside, or NaN.
        ConfigError: an FPR outside (0, 1), or a confidence outside (0, 1).
    """
    above, below = scores(inside, outside, confidence, 0.0)
    if not 0 < fpr < 1:
        raise ConfigError(f"fpr = {fpr!r}: must lie between 0 and 1, such as 0.01")
    # Products such as 0.29 * 100 fall just short of the whole number that is meant.
    allowed = math.floor(fpr * below.size * (1 + 1e-12))
    found = int(np.sum(above > below[below.size - 1 - allowed]))
    exact = clopper_pearson(found, above.size, confidence)
    note = "" if allowed else f", FPR unresolved below 1/{below.size}: at no false alarm"
    return Estimate(exact.value, exact.low, exact.high, exact.n, exact.method + note)


def _wins(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return for each score the share of the others below it, ties half; both ascend."""
    left, right = (np.searchsorted(others, scores, side=side) for side in ("left", "right"))
    return (left + right) / (2 * others.size)
