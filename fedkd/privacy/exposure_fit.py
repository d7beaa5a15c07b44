"""The skew-normal fit to reference scores, read far into the tail where memorised canaries lie.

The distribution function itself underflows there: a canary some deviations below all references
would get an infinite exposure. Here its logarithm is integrated, so every value stays finite.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.special import log_ndtr, ndtr, owens_t

STEEPEST = 100.0
"""Shape beyond which the fit is a half-normal with an edge: what lies past it has no likelihood."""
GAP = 0.01
"""What the log-likelihood may still gain, in nats, for a fit to count as converged."""
TAIL = 1e-6
"""Below this the distribution function loses digits (by cancellation) and is integrated instead."""
NODES = 64


@dataclass(frozen=True)
class SkewNormal:
    """A skew-normal distribution: density 2/scale phi(z) Phi(shape z), z = (x - location)/scale.

    ``shape = 0`` is the normal distribution. Azzalini (Scandinavian Journal of Statistics 1985).
    """

    shape: float
    location: float
    scale: float

    @classmethod
    def fit(cls, values: ArrayLike) -> SkewNormal | None:
        """Return the maximum-likelihood fit, or None where there is none to be trusted.

        Started from the moments; the order of ``values`` does not matter. None: all values are
        equal, the optimiser stopped short of the maximum (judged by a Newton step from where it
        stopped, not by its own word), or the likelihood grows towards a half-normal.
        """
        known = np.sort(np.asarray(values, dtype=np.float64))
        if not np.ptp(known) > 0:
            return None
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            try:
                found = cls(*(float(value) for value in stats.skewnorm.fit(known)))
            except stats.FitError:
                return None
            gap = found._gap(known)
        return found if abs(found.shape) <= STEEPEST and gap <= GAP else None

    def log_cdf(self, values: ArrayLike) -> np.ndarray:
        """Return the natural logarithm of P[X <= value]: finite for finite values, never above 0.

        Where P < 1e-6 it is log f(z) - log s + log of the integral over v >= 0 of
        exp(log f(z - v/s) - log f(z)), s the slope of log f at z: log f is concave, so the
        integrand never exceeds exp(-v) and Gauss-Laguerre quadrature fits it at any depth.
        """
        z = (np.asarray(values, dtype=np.float64) - self.location) / self.scale
        # Phi(z) - 2 T(z, shape), Owen's T.
        plain = ndtr(z) - 2 * owens_t(z, self.shape)
        deep = plain < TAIL
        result = np.log(np.where(deep, 1.0, np.minimum(plain, 1.0)))
        result[deep] = self._tail(z[deep])
        return result

    def agreement(self, values: ArrayLike) -> float:
        """Return the p-value of the Kolmogorov-Smirnov test of ``values`` against this fit.

        It is on the mild side where the values are those of the fit: parameters that were chosen
        to agree do agree better.
        """
        known = np.sort(np.asarray(values, dtype=np.float64))
        return float(stats.ks_1samp(known, lambda x: np.exp(self.log_cdf(x))).pvalue)

    def _tail(self, z: np.ndarray) -> np.ndarray:
        a = self.shape
        nodes, weights = np.polynomial.laguerre.laggauss(NODES)
        at, slope = _log_density(z, a), -z + a * _hazard(a * z)
        inside = _log_density(z[:, None] - nodes / slope[:, None], a) - at[:, None] + nodes
        return at - np.log(slope) + np.log(np.exp(np.minimum(inside, 0.0)) @ weights)

    def _gap(self, x: np.ndarray) -> float:
        """Return about how far the log-likelihood of ``x`` lies below its maximum, in nats."""
        z = (x - self.location) / self.scale
        pull = _hazard(self.shape * z)
        scores = np.stack([z * pull, z - self.shape * pull, z * (z - self.shape * pull) - 1], 1)
        if not np.isfinite(scores).all():
            return math.inf
        total = scores.sum(axis=0)
        step = np.linalg.lstsq(scores.T @ scores, total, rcond=None)[0]
        return float(total @ step) / 2


def _log_density(z: np.ndarray, a: float) -> np.ndarray:
    return -0.5 * z * z + math.log(2 / math.sqrt(2 * math.pi)) + log_ndtr(a * z)


def _hazard(y: np.ndarray) -> np.ndarray:
    """Return phi(y) / Phi(y)."""
    return np.exp(-0.5 * y * y - 0.5 * math.log(2 * math.pi) - log_ndtr(y))
