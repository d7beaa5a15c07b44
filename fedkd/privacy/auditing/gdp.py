"""A far tighter bound from the same counts, for a mechanism whose trade-off curve is Gaussian.

One point (FPR, TPR) then fixes the whole curve, and with it epsilon at deltas that no number of
canaries could resolve (Nasr et al., USENIX Security 2023; Dong et al., JRSS B 2022).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from fedkd.privacy.accounting import gaussian_epsilon
from fedkd.privacy.auditing.bound import Bound, bound, geometric, scores
from fedkd.privacy.auditing.clopper_pearson import lower, thresholds, upper

METHOD = "gdp"


def mu(
    true_positives: ArrayLike,
    n_inside: int,
    false_positives: ArrayLike,
    n_outside: int,
    significance: float,
) -> np.ndarray:
    """Return max(0, z(1 - FPR_high) - z(1 - TPR_low)), z the normal quantile, of each threshold.

    Each rate gets half of ``significance``. The threshold must be fixed beforehand.
    """
    tpr = lower(true_positives, n_inside, significance / 2)
    fpr = upper(false_positives, n_outside, significance / 2)
    return np.maximum(special.ndtri(tpr) - special.ndtri(fpr), 0.0)


def gdp(inside: ArrayLike, outside: ArrayLike, *, confidence: float, delta: float) -> Bound:
    """Return the epsilon at ``delta`` of the largest mu that the counts certify.

    Thresholds are as for Clopper and Pearson, guessing "in" only, Bonferroni-corrected over them.
    Valid only where the trade-off curve of the mechanism is Gaussian, as of Gaussian noise on a sum
    (with sampling, and after many steps, roughly so), and for independent scores.

    Raises:
        DataError: nothing inside or outside, or NaN.
        ConfigError: confidence or delta out of range, or delta 0.
    """
    above, below = scores(inside, outside, confidence, delta, gaussian=True)
    significance = (1 - confidence) / len(geometric(below.size))
    tp, fp = thresholds(above, below)
    found = float(mu(tp, above.size, fp, below.size, significance).max())
    most = float(mu(above.size, above.size, 0, below.size, significance))
    return bound(
        gaussian_epsilon(found, delta),
        gaussian_epsilon(most, delta),
        above.size + below.size,
        METHOD,
        confidence,
        delta,
        on="the trade-off curve is Gaussian, scores of different canaries are independent",
    )
