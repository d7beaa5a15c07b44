"""All bounds that the scores of one audited run allow, side by side."""

from __future__ import annotations

from numpy.typing import ArrayLike

from fedkd.privacy.auditing.bound import Bound
from fedkd.privacy.auditing.clopper_pearson import clopper_pearson
from fedkd.privacy.auditing.fdp import one_run_fdp
from fedkd.privacy.auditing.gdp import gdp
from fedkd.privacy.auditing.one_run import one_run


def all_bounds(
    inside: ArrayLike, outside: ArrayLike, *, confidence: float, delta: float
) -> list[Bound]:
    """Return every bound, weakest assumptions first; those of a Gaussian curve need delta > 0.

    Each holds with probability ``confidence`` by itself; picking the largest needs a correction
    for how many they are. Scores: higher means more likely in, in any order.

    Raises:
        DataError: nothing inside or outside, or NaN.
        ConfigError: confidence or delta out of range.
    """
    found = [
        one_run(inside, outside, confidence=confidence, delta=delta),
        clopper_pearson(inside, outside, confidence=confidence, delta=delta),
    ]
    if delta > 0:
        found += [
            one_run_fdp(inside, outside, confidence=confidence, delta=delta),
            gdp(inside, outside, confidence=confidence, delta=delta),
        ]
    return found
