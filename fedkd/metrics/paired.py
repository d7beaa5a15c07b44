"""The difference of two methods on the same seeds and the same clients, with its interval.

What seeds and clients share (partition, initial network, how hard a client's data are) cancels in
the difference, so two methods whose own intervals overlap can differ for certain.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from fedkd.rng import Rng
from fedkd.types import Estimate


def paired_bootstrap(
    a: ArrayLike, b: ArrayLike, rng: Rng, confidence: float = 0.95, resamples: int = 2000
) -> Estimate:
    """Return the mean of ``a - b`` over seeds and clients with its hierarchical bootstrap interval.

    ``a`` and ``b`` are (S, K): seed by client; (K,) is one seed. The value is the mean over seeds
    of the means over clients. Seeds are drawn with replacement, then clients within each seed that
    was drawn, and the bounds are the percentiles ``(1 ± confidence) / 2`` of the resampled means.
    Pairs with a NaN on either side are left out, and so are seeds without any pair. ``n`` counts
    the seeds; with a single seed the clients, and ``method`` then says that other seeds are not
    covered. A single pair has no interval (NaN bounds). Davison and Hinkley ("Bootstrap Methods",
    1997, section 3.8).

    Few seeds make it too narrow, as S values say little of how seeds vary. Coverage of the 95 %
    interval, measured with normal effects of seeds and of 20 clients (``tests/oracle``): where all
    variation is between seeds 72 % with 3 seeds, 82 % with 5, 90 % with 10; where the variance of a
    seed's mean is half from its clients 93 %, 95 %, 97 %; all from its clients 97 % and more, as
    they are then counted twice. Below about 10 seeds show
    :func:`fedkd.metrics.intervals.paired_t` over seeds beside it, which kept its 95 % in all of
    these.

    Raises:
        ValueError: shapes differ; ``confidence`` is not in (0, 1), ``resamples < 1``; no pair at
            all, or an infinite value.

    >>> a, b = [[0.9, 0.7], [0.8, 0.8], [0.9, 0.6]], [[0.8, 0.7], [0.6, 0.8], [0.8, 0.6]]
    >>> print(paired_bootstrap(a, b, Rng(0)))
    0.06667 [0.01667, 0.1333] (n=3, paired bootstrap over seeds and clients 95% (percentile))
    """
    seeds = _differences(a, b)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence} must be between 0 and 1, for instance 0.95")
    if resamples < 1:
        raise ValueError(f"resamples = {resamples} must be at least 1")
    value = float(np.mean([d.mean() for d in seeds]))
    level = f"{100 * confidence:g}%"
    method = f"paired bootstrap over seeds and clients {level} (percentile)"
    n = len(seeds)
    if n == 1:
        method = (
            f"paired bootstrap over the clients of one seed {level} (percentile); other seeds are "
            "not covered"
        )
        n = seeds[0].size
        if n == 1:
            return Estimate(value, math.nan, math.nan, 1, method)
    tail = (1 - confidence) / 2
    low, high = np.quantile(_resampled(seeds, rng, resamples), [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n, method)


def _differences(a: ArrayLike, b: ArrayLike) -> list[np.ndarray]:
    """Return the differences of each seed that has any, without NaN."""
    first, second = (np.atleast_2d(np.asarray(x, dtype=float)) for x in (a, b))
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"a is {first.shape} and b is {second.shape}; both must be (seeds, clients), with the "
            "same seeds and clients in the same places"
        )
    if np.isinf(first).any() or np.isinf(second).any():
        raise ValueError("a or b has an infinite value")
    rows = first - second
    found = [row[~np.isnan(row)] for row in rows]
    kept = [row for row in found if row.size]
    if not kept:
        raise ValueError("a and b have no value in common: every pair has a NaN")
    return kept


def _resampled(seeds: list[np.ndarray], rng: Rng, resamples: int) -> np.ndarray:
    """Return the means (resamples,) of resampled seeds with resampled clients."""
    generator = rng.numpy()
    drawn = generator.integers(len(seeds), size=(resamples, len(seeds)))
    means = np.empty(drawn.shape)
    for index, values in enumerate(seeds):
        here = drawn == index
        # A seed that is drawn twice gets new clients each time.
        clients = generator.integers(values.size, size=(int(here.sum()), values.size))
        means[here] = values[clients].mean(axis=1)
    return np.asarray(means.mean(axis=1))
