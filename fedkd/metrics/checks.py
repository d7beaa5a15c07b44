"""One place that refuses empty or undefined values, so that no mean of nothing gets reported."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def finite(values: ArrayLike, what: str = "values") -> np.ndarray:
    """Return ``values`` as a float64 vector.

    Raises:
        ValueError: they are empty, no vector, NaN or infinite; ``what`` names them.

    >>> finite([1, 2])
    array([1., 2.])
    >>> finite([], "accuracies")
    Traceback (most recent call last):
    ValueError: accuracies are empty
    """
    array = vector(values, what)
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise ValueError(
            f"{what} hold {array[bad[0]]} at position {bad[0]} ({bad.size} of {array.size} are not "
            "finite); leave out what was not measured, such as clients without test examples"
        )
    return array


def vector(values: ArrayLike, what: str = "values") -> np.ndarray:
    """Return ``values`` as a float64 vector that may hold NaN.

    Raises:
        ValueError: they are empty or no vector.

    >>> vector([float("nan"), 1])
    array([nan,  1.])
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{what} must be one list of numbers, not an array of shape {array.shape}")
    if not array.size:
        raise ValueError(f"{what} are empty")
    return array


def same_length(first: np.ndarray, second: np.ndarray, what: str) -> None:
    """Raise ValueError if two paired vectors differ in length.

    >>> same_length(np.zeros(2), np.zeros(3), "accuracies and counts")
    Traceback (most recent call last):
    ValueError: accuracies and counts must be paired, but there are 2 and 3
    """
    if len(first) != len(second):
        raise ValueError(f"{what} must be paired, but there are {len(first)} and {len(second)}")
