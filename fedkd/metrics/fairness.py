"""How evenly a federation serves its clients: a high mean can hide clients that lose by joining.

Each function takes one value per client, usually the accuracy on the client's own test data.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fedkd.metrics.checks import finite
from fedkd.types import Metrics


def std(values: ArrayLike) -> float:
    """Return the standard deviation over clients, ``sqrt(mean((a_k - mean(a))^2))``.

    The divisor is the number of clients: the clients of the federation are the whole population,
    not a sample. 0 means that all are served equally, and so does a single client.

    Raises:
        ValueError: no values, or values that are not finite.

    >>> std([0.5, 1.0])
    0.25
    """
    return float(finite(values).std())


def worst_share(values: ArrayLike, share: float = 0.1) -> float:
    """Return the mean of the worst ``ceil(share * n)`` values, by default the worst 10 %.

    ``share = 1`` is the mean of all; ``share -> 0`` the minimum.

    Raises:
        ValueError: ``share`` is not in (0, 1]; no values, or values that are not finite.

    >>> worst_share([0.2, 0.4, 0.9, 0.9], share=0.5)
    0.3...
    """
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be above 0 and at most 1")
    ordered = np.sort(finite(values))
    # The small term keeps 0.07 * 100 = 7.000000000000001 from counting as 8.
    worst = max(1, math.ceil(share * ordered.size - 1e-9))
    return float(ordered[:worst].mean())


def jain(values: ArrayLike) -> float:
    """Return Jain's fairness index ``(sum a)^2 / (n sum a^2)``, between 1/n and 1.

    1 when all values are equal (all zero included), 1/n when one client gets everything;
    multiplying all values by one factor changes nothing. Jain, Chiu and Hawe (DEC-TR-301, 1984).

    Raises:
        ValueError: a value is negative; no values, or values that are not finite.

    >>> jain([1, 1, 1, 1]), jain([1, 0, 0, 0]), jain([0, 0])
    (1.0, 0.25, 1.0)
    """
    array = finite(values)
    if (array < 0).any():
        raise ValueError(f"Jain's index needs values of at least 0, not {array.min():g}")
    largest = array.max()
    if largest == 0:
        return 1.0
    scaled = array / largest
    return float(scaled.sum() ** 2 / (scaled.size * (scaled**2).sum()))


def spread(values: ArrayLike, share: float = 0.1) -> Metrics:
    """Return the three measures of fairness by name.

    >>> spread([1.0, 0.0])
    {'std': 0.5, 'worst_share': 0.0, 'jain': 0.5}
    """
    return {"std": std(values), "worst_share": worst_share(values, share), "jain": jain(values)}
