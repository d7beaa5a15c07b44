"""Finding similar examples without the examples: binary codes, and the nearest of the same class.

A code is the signs of random projections, the same on every client, so the share of bits in which
two codes differ estimates the angle between two examples. Neighbours are searched exactly.
"""

from __future__ import annotations

import math

import numpy as np

from fedkd.rng import Rng

CHUNK = 1024
"""Rows of one table of distances: bounds memory."""


def random_planes(size: int, bits: int, rng: Rng) -> np.ndarray:
    """Return the normals of ``bits`` random hyperplanes through the origin of R^size, (size, bits).

    Entries are independent standard normals in double precision; equal addresses, equal planes.
    """
    return rng.numpy().standard_normal((size, bits))


def hash_codes(x: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """Return the packed codes (n, ceil(bits / 8)) uint8 of examples x (n, ...): ``x . w_j >= 0``.

    Two examples at an angle theta differ in a bit with probability theta / pi, so codes of
    standardised inputs order pairs as their cosine does, up to noise of the order
    ``1 / sqrt(bits)``. The last byte is filled up with zeros, which add to no distance.
    Source: Charikar, Similarity Estimation Techniques from Rounding Algorithms, STOC 2002.

    >>> hash_codes(np.array([[1.0, 2.0], [-1.0, 2.0]]), np.eye(2)).tolist()
    [[192], [64]]
    """
    flat = x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64)
    return np.packbits(flat @ planes >= 0, axis=1)


def hamming(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the number of bits, (n, m) int64, in which codes a (n, w) and b (m, w) differ.

    It is ``|a| + |b| - 2 a . b`` over the unpacked bits, exact up to 2^24 bits.

    >>> hamming(np.array([[192]], np.uint8), np.array([[64], [192]], np.uint8)).tolist()
    [[1, 0]]
    """
    left, right = (np.unpackbits(codes, axis=1).astype(np.float32) for codes in (a, b))
    common = left @ right.T
    return (left.sum(1)[:, None] + right.sum(1) - 2 * common).astype(np.int64)


def nearest_same_class(
    codes: np.ndarray, labels: np.ndarray, owners: np.ndarray, count: int
) -> np.ndarray:
    """Return for each example the ``count`` nearest of its class that others own, (n, count) int32.

    ``codes`` (n, w) packed, ``labels`` (n,), ``owners`` (n,). Rows hold positions, nearest first;
    of equally near ones the lower position comes first. Where fewer exist the rest is -1. With an
    owner for each example, ``owners = arange(n)``, all but the example itself are searched.

    >>> codes = np.array([[0], [1], [3], [0]], dtype=np.uint8)
    >>> nearest_same_class(codes, np.zeros(4), np.array([0, 0, 1, 1]), 2).tolist()
    [[3, 2], [2, 3], [1, 0], [0, 1]]
    """
    found = np.full((len(labels), count), -1, dtype=np.int32)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        kept = min(count, len(rows))
        # Distance first, position second: one number orders both, so ties need no further rule.
        far = (codes.shape[1] * 8 + 1) * len(rows)
        for start in range(0, len(rows), CHUNK):
            part = rows[start : start + CHUNK]
            keys = hamming(codes[part], codes[rows]) * len(rows) + np.arange(len(rows))
            keys[owners[part][:, None] == owners[rows]] = far
            best = np.sort(np.partition(keys, kept - 1, axis=1)[:, :kept], axis=1)
            found[part, :kept] = np.where(best < far, rows[best % len(rows)], -1)
    return found
