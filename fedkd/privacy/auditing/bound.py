"""What every audit returns: an epsilon that was shown to be exceeded, and how far it could see.

A lower bound on epsilon says little without its ceiling, which is what a perfect attack on as many
canaries would have certified: a low bound below a low ceiling is no evidence of privacy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from fedkd.errors import ConfigError, DataError

LEAST = 10
"""Fewer canaries than this certify nothing."""


@dataclass(frozen=True)
class Bound:
    """With probability ``confidence`` nothing below ``epsilon`` holds at ``delta``.

    ``ceiling`` is what a perfect attack would certify with the same ``n`` canaries, ``assumes``
    what must be true for the bound to hold. Each bound holds by itself: the largest of several
    does not hold with the same probability.
    """

    epsilon: float
    ceiling: float
    method: str
    confidence: float
    delta: float
    n: int
    assumes: str

    def __str__(self) -> str:
        return (
            f"epsilon >= {self.epsilon:.4g} of at most {self.ceiling:.4g} with {self.n} canaries "
            f"({self.method}, {100 * self.confidence:g}%, delta = {self.delta:g}, "
            f"assumes {self.assumes})"
        )


def bound(
    epsilon: float, ceiling: float, n: int, method: str, confidence: float, delta: float, *, on: str
) -> Bound:
    """Return the bound, 0 and so said where as many canaries cannot certify anything.

    ``on`` is what it rests on. A method that cannot certify anything from so few canaries says it
    there as well, so that 0 is not read as safe.
    """
    if n < LEAST or ceiling <= 0:
        on += f"; {n} canaries are too few to certify anything: 0 says nothing of privacy"
        return Bound(0.0, 0.0, method, confidence, delta, n, on)
    epsilon = max(epsilon, 0.0)
    return Bound(epsilon, max(ceiling, epsilon), method, confidence, delta, n, on)


def per_copy(bound: Bound, copies: int) -> Bound:
    """Return what a bound on canaries of ``copies`` copies each says of one record.

    Group privacy: (e, d)-DP of a record is (k e, d (exp(k e) - 1) / (exp(e) - 1))-DP of k copies,
    so that a bound E at D for the group is one of E / k at D (exp(E / k) - 1) / (exp(E) - 1).
    The delta shrinks: E / k at D itself would be too high. Copies within one unit need none.

    Raises:
        ConfigError: ``copies`` below 1.
    """
    if copies < 1:
        raise ConfigError(f"copies = {copies!r}: must be at least 1")
    epsilon = bound.epsilon / copies
    if epsilon > 0:
        shrinks = math.expm1(-epsilon) / math.expm1(-bound.epsilon)
        shrinks *= math.exp(epsilon - bound.epsilon)
    else:
        shrinks = 1 / copies
    delta = bound.delta * shrinks
    return replace(bound, epsilon=epsilon, ceiling=bound.ceiling / copies, delta=delta)


def scores(
    inside: ArrayLike,
    outside: ArrayLike,
    confidence: float,
    delta: float,
    *,
    gaussian: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Return both arrays of scores, sorted, float64; higher means more likely in.

    Only their order counts, so infinite scores are allowed. ``gaussian``: for methods that report
    the epsilon of a Gaussian mechanism, which has none at delta 0.

    Raises:
        DataError: no canary in or none out, a score that is NaN, or not a list of numbers.
        ConfigError: a confidence or delta that means nothing.
    """
    check(confidence, delta, gaussian=gaussian)
    found = []
    for name, values in (("inside", inside), ("outside", outside)):
        array = np.sort(np.asarray(values, dtype=np.float64))
        if array.ndim != 1 or not array.size:
            raise DataError(
                f"scores of canaries {name} have the shape {array.shape}: an audit needs a list of "
                "at least one canary that was planted and one that was not; plant more canaries "
                "(canaries.count), or another seed where all coins fell alike"
            )
        if np.isnan(array).any():
            raise DataError(
                f"{int(np.isnan(array).sum())} of {array.size} scores of canaries {name} are NaN; "
                "the model diverged or the attack failed: lower the learning rate, or leave the "
                "attack out"
            )
        found.append(array)
    return found[0], found[1]


def check(confidence: float, delta: float, *, gaussian: bool = False) -> None:
    """Refuse a confidence outside (0, 1), and a delta outside [0, 1), or (0, 1) where Gaussian."""
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence!r}: must lie between 0 and 1, such as 0.95")
    if not 0 <= delta < 1 or (gaussian and delta == 0):
        also = ", and above 0 since no Gaussian mechanism has an epsilon at 0" if gaussian else ""
        raise ConfigError(f"delta = {delta!r}: must be at least 0 and below 1{also}, such as 1e-5")


def largest(refuted: Callable[[float], bool], tolerance: float) -> float:
    """Return the largest x >= 0 that is refuted, where all below it are too; 0 if none is.

    Found by doubling, then bisection to a relative ``tolerance``, from below.
    """
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high):
        low, high = high, 2 * high
    while high - low > tolerance * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def geometric(most: int, least: int = 1, ratio: float = math.sqrt(2)) -> list[int]:
    """Return ``most``, ``most / ratio``, ... down to ``least``, as distinct whole numbers.

    Fixed by the numbers of canaries alone, so that a search over them needs no more than a
    correction for how many they are, which grows with log ``most`` only.

    >>> geometric(8), geometric(3, 4)
    ([8, 5, 4, 2, 1], [])
    """
    steps = math.floor(math.log(most / least, ratio) + 1e-9) + 1 if most >= least else 0
    found = {max(least, math.floor(most / ratio**i + 1e-9)) for i in range(steps)}
    return sorted(found, reverse=True)
