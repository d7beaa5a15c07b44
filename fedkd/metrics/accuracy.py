"""Accuracies over clients and classes, with names that keep the two kinds of mean apart.

"Accuracy of a federation" means the unweighted or the sample-weighted mean in different papers,
and the two differ by points under label skew.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from fedkd.metrics.checks import finite, same_length, vector


def user_accuracy(acc_by_client: ArrayLike) -> float:
    """Return the average user-model accuracy (UA): the mean over clients, each counted once.

    Raises:
        ValueError: no values, or values that are not finite.

    >>> user_accuracy([0.5, 1.0])
    0.75
    """
    return float(finite(acc_by_client, "accuracies").mean())


def weighted_accuracy(acc_by_client: ArrayLike, examples: ArrayLike) -> float:
    """Return the sample-weighted accuracy ``sum(n_k acc_k) / sum(n_k)``: each example counts once.

    Clients without examples are left out, whatever their accuracy. Equal to
    :func:`user_accuracy` when all clients have the same number of examples.

    Raises:
        ValueError: lengths differ, a count is negative, or no client has an example.

    >>> weighted_accuracy([0.5, 1.0, float("nan")], [30, 10, 0])
    0.625
    """
    accuracies = vector(acc_by_client, "accuracies")
    counts = finite(examples, "counts")
    same_length(accuracies, counts, "accuracies and counts")
    if (counts < 0).any() or not counts.any():
        raise ValueError("counts must not be negative, and one at least must be positive")
    some = counts > 0
    return float(np.average(finite(accuracies[some], "accuracies"), weights=counts[some]))


def per_class_accuracy(correct: ArrayLike, total: ArrayLike) -> np.ndarray:
    """Return the accuracy of each class ``correct_c / total_c``; NaN where a class has no example.

    Raises:
        ValueError: lengths differ, or not ``0 <= correct <= total``.

    >>> per_class_accuracy([1, 0, 0], [2, 4, 0])
    array([0.5, 0. , nan])
    """
    right, all_ = _counts(correct, total)
    return np.divide(right, all_, out=np.full_like(right, np.nan), where=all_ > 0)


def absent_class_accuracy(correct: ArrayLike, total: ArrayLike, absent: ArrayLike) -> float:
    """Return the accuracy on classes that the client has never seen, each example counted once.

    ``absent`` is a mask over classes; ``correct`` and ``total`` count test examples by class, of
    the global test set. NaN when no class is absent, or no absent class has a test example.

    Raises:
        ValueError: lengths differ, or not ``0 <= correct <= total``.

    >>> absent_class_accuracy([9, 1, 0], [10, 5, 5], [False, True, True])
    0.1
    >>> absent_class_accuracy([9, 1], [10, 5], [False, False])
    nan
    """
    right, all_ = _counts(correct, total)
    mask = np.asarray(absent, dtype=bool)
    same_length(right, mask, "counts and the mask of absent classes")
    examples = all_[mask].sum()
    return float(right[mask].sum() / examples) if examples else float("nan")


def _counts(correct: ArrayLike, total: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    right, all_ = finite(correct, "correct"), finite(total, "total")
    same_length(right, all_, "correct and total")
    wrong = np.flatnonzero((right < 0) | (right > all_))
    if wrong.size:
        c = wrong[0]
        raise ValueError(f"class {c} has {right[c]:g} correct of {all_[c]:g}")
    return right, all_
