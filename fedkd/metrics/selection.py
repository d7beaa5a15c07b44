"""Which round is reported.

The best round on the test set is never offered: its optimistic bias grows with the noise and the
number of rounds, so it rewards unstable methods.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedkd.metrics.checks import same_length, vector


def last(values: ArrayLike) -> float:
    """Return the value of the last round.

    Raises:
        ValueError: there are no values.

    >>> last([0.1, 0.9, 0.8])
    0.8
    """
    return float(vector(values)[-1])


def mean_last(values: ArrayLike, k: int) -> float:
    """Return the mean over the last ``k`` rounds, or over all where there are fewer.

    ``k = 1`` is :func:`last`. NaN if one of these rounds is NaN.

    Raises:
        ValueError: there are no values, or ``k < 1``.

    >>> mean_last([0.0, 0.5, 1.0], 2)
    0.75
    """
    if k < 1:
        raise ValueError(f"k = {k} must be at least 1")
    return float(vector(values)[-k:].mean())


def chosen_on_validation(validation: ArrayLike, test: ArrayLike) -> tuple[int, float]:
    """Return the position of the round with the best validation value, and its *test* value.

    The first of equal rounds wins. Rounds whose validation value is NaN are never chosen.

    Raises:
        ValueError: there are no values, lengths differ, or all validation values are NaN.

    >>> chosen_on_validation([0.5, 0.8, 0.8], [0.6, 0.7, 0.9])
    (1, 0.7)
    """
    judged, reported = vector(validation, "validation values"), vector(test, "test values")
    same_length(judged, reported, "validation and test values")
    if np.isnan(judged).all():
        raise ValueError("all validation values are NaN, so no round can be chosen")
    best = int(np.nanargmax(judged))
    return best, float(reported[best])
