"""Low-rank factors of weight updates, where they are smaller than the update itself.

The rank is chosen by the energy to be kept, so a layer that moved in few directions costs little
and one that moved in many is sent as it is.
"""

from __future__ import annotations

import numpy as np

Factors = tuple[np.ndarray, np.ndarray]
"""``u`` (m, r) with orthonormal columns and ``sv`` (r, n), singular values times right vectors."""


def as_matrix(array: np.ndarray) -> np.ndarray:
    """Return a weight as a matrix (m, n): the first axis, and all others in one.

    A convolution kernel (out, in, height, width) becomes (out, in * height * width).

    >>> as_matrix(np.zeros((8, 3, 5, 5))).shape
    (8, 75)
    """
    return array.reshape(len(array), -1)


def most_rank(shape: tuple[int, ...]) -> int:
    """Return the largest rank whose factors are smaller than a weight of ``shape``; 0: none is.

    ``r (m + n) < m n`` for the (m, n) of :func:`as_matrix`; vectors and scalars have none.

    >>> most_rank((10, 10)), most_rank((1, 50)), most_rank((50,))
    (4, 0, 0)
    """
    if len(shape) < 2 or 0 in shape:
        return 0
    m, n = shape[0], int(np.prod(shape[1:]))
    return (m * n - 1) // (m + n)


def rank_for(singular: np.ndarray, energy: float) -> int:
    """Return the smallest rank, at least 1, with ``sum_{i<=r} s_i^2 >= energy * sum_i s_i^2``.

    ``singular`` in descending order; ``energy`` in (0, 1].

    >>> rank_for(np.array([2.0, 1.0, 0.0]), 0.8), rank_for(np.array([2.0, 1.0, 0.0]), 0.81)
    (1, 2)
    """
    kept = np.cumsum(np.square(singular, dtype=np.float64))
    return min(len(singular), int(np.searchsorted(kept, energy * kept[-1])) + 1)


def factorise(update: np.ndarray, energy: float) -> Factors | None:
    """Return the truncated singular value decomposition of an update, None where it does not pay.

    None means: send the update as it is, because it is no matrix, because factors of the rank that
    keeps ``energy`` (see :func:`rank_for`) are not smaller than it, or because ``energy`` is 1,
    which asks for every bit. The relative squared error is at most ``1 - energy``; nothing of what
    is cut off is made up for later.
    Source: Wu et al., Communication-efficient federated learning via knowledge distillation, Nature
    Communications 2022.
    """
    most = most_rank(update.shape) if energy < 1 else 0
    if not most:
        return None
    u, singular, v = np.linalg.svd(as_matrix(update), full_matrices=False)
    rank = rank_for(singular, energy)
    if rank > most:
        return None
    return np.ascontiguousarray(u[:, :rank]), singular[:rank, None] * v[:rank]


def restore(base: np.ndarray, factors: Factors) -> np.ndarray:
    """Return ``base + u sv`` in the shape and type of ``base``: an update put back on its weight.

    The product is made in double precision, so that both ends come to the same bits.

    >>> restore(np.zeros((2, 2), np.float32), (np.eye(2, 1), np.float32([[1, 3]]))).tolist()
    [[1.0, 3.0], [0.0, 0.0]]
    """
    u, sv = (factor.astype(np.float64) for factor in factors)
    return base + (u @ sv).astype(base.dtype).reshape(base.shape)
