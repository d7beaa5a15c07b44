"""Weights as a vector of bounded length: what a mechanism needs before it may add noise.

A client can send anything, so the bound is made here, on what arrived, and holds for any finite
arrays. What is bounded is the update, the difference from a public reference; without clipping
there is no bound to keep, and the weights themselves are summed, which is plain averaging.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from fedkd.errors import ConfigError, RunError
from fedkd.privacy.options import Clipping
from fedkd.privacy.payload import Weights
from fedkd.types import Arrays

LARGEST = float(np.finfo(np.float64).max)


class Coder(Protocol):
    """One part of an upload as a vector: ``||encode(x)|| <= bound`` in L2 for any arrays x."""

    @property
    def bound(self) -> float:
        """The sensitivity of the sum to one client that is added, removed or silent."""
        ...

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the client's vector (D,), float64; zeros where it said nothing."""
        ...

    def decode(self, total: np.ndarray, expected: float, noise_std: float) -> Arrays:
        """Return arrays from the noisy sum (D,) over ``expected`` clients."""
        ...


class WeightsCoder:
    """``encode: u min(1, C / ||u||)`` of ``u = x - reference``; ``decode: reference + sum / n``.

    The float arrays count, in the order of their sorted keys; ``per-layer`` clips each of the L of
    them to ``C / sqrt(L)``, so that all together stay within C. Arrays of integers carry no update,
    and what a client did not send is a zero update. ``C = inf`` sums the weights themselves and
    how many there were, and decodes ``reference (1 - m / n) + sum / n`` of m clients: with m = n
    the bits of a plain average, and no bound at all.

    McMahan, Ramage, Talwar and Zhang, "Learning differentially private recurrent language models",
    ICLR 2018, Algorithm 1 (flat and per-layer clipping).
    """

    def __init__(self, part: Weights, clipping: Clipping, norm: float) -> None:
        if not norm > 0:
            raise ConfigError(
                f"the clipping norm is {norm}; give privacy.clipping.norm > 0, or inf not to clip"
            )
        self.bound = float(norm)
        self._reference = part.reference
        self._keys = sorted(
            k for k, a in part.reference.items() if np.issubdtype(a.dtype, np.floating)
        )
        self._layered = clipping.mode == "per-layer"
        self._summing = math.isinf(norm)

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the clipped update (D,), or weights and a one (D + 1,) where nothing is clipped.

        Raises:
            RunError: an array is not finite or has another shape than its reference.
        """
        if self._summing:
            return self._weights(arrays)
        pieces = list(self._update(arrays))
        if not self._layered:
            return clipped(_joined(pieces), self.bound)
        limit = self.bound / math.sqrt(max(1, len(pieces)))
        return _joined([clipped(piece, limit) for piece in pieces])

    def vote(self, arrays: Arrays) -> float:
        """Return the bit of adaptive clipping, centred: 1/2 if ``||update|| <= C``, else -1/2.

        A client that trained without effect has a zero update and is unclipped, one that sent no
        weights at all gives 0, so that to be silent is to be absent: else the count would change by
        1, not by 1/2, between neighbours where one client falls silent.
        """
        if not any(key in arrays for key in self._keys):
            return 0.0
        largest, relative = _length(_joined(list(self._update(arrays))))
        return 0.5 if largest * relative <= self.bound else -0.5

    def decode(self, total: np.ndarray, expected: float, noise_std: float = 0.0) -> Arrays:
        """Return ``reference + total / expected`` in the reference's types.

        The divisor is the expected number of clients, which is public; the realised one is not.
        """
        if not expected > 0:
            raise ConfigError(f"{expected} clients are expected in a round; it takes more than 0")
        made = {key: array.copy() for key, array in self._reference.items()}
        start = 0
        for key in self._keys:
            base = self._reference[key]
            piece = total[start : start + base.size].reshape(base.shape)
            start += base.size
            kept = 1.0 - float(total[-1]) / expected if self._summing else 1.0
            made[key] = (base.astype(np.float64) * kept + piece / expected).astype(base.dtype)
        return made

    def _weights(self, arrays: Arrays) -> np.ndarray:
        if not any(key in arrays for key in self._keys):
            return np.zeros(sum(self._reference[key].size for key in self._keys) + 1)
        sent = {**self._reference, **arrays}
        return _joined([*(self._value(sent, key) for key in self._keys), np.ones(1)])

    def _update(self, arrays: Arrays) -> Iterator[np.ndarray]:
        for key in self._keys:
            base = self._reference[key].astype(np.float64).ravel()
            if key in arrays:
                with np.errstate(over="ignore"):  # two finite numbers may be that far apart
                    yield np.clip(self._value(arrays, key) - base, -LARGEST, LARGEST)
            else:
                yield np.zeros(base.size)

    def _value(self, arrays: Arrays, key: str) -> np.ndarray:
        array, shape = arrays[key], self._reference[key].shape
        if array.shape != shape:
            raise RunError(f"{key} has shape {array.shape}; its reference has {shape}")
        with np.errstate(over="ignore"):
            value = array.astype(np.float64).ravel()
        if not np.isfinite(value).all():
            raise RunError(f"{key} is not finite: the client diverged; lower its learning rate")
        return value


def weights_coder(part: Weights, clipping: Clipping, norm: float) -> WeightsCoder:
    """Return the coder of a part of weights; ``norm`` is the bound of this round."""
    return WeightsCoder(part, clipping, norm)


def clipped(vector: np.ndarray, limit: float) -> np.ndarray:
    """Return ``vector`` (D,), or the vector of that direction whose L2 norm is ``limit``.

    Squares are taken relative to the largest entry, so no finite vector overflows or underflows.

    >>> clipped(np.array([3e200, 4e200]), 1.0).round(12).tolist()
    [0.6, 0.8]
    >>> clipped(np.zeros(2), 1.0).tolist()
    [0.0, 0.0]
    """
    largest, relative = _length(vector)
    if largest * relative <= limit:
        return vector
    return vector / largest * (limit / relative)


def _length(vector: np.ndarray) -> tuple[float, float]:
    """Return the largest magnitude m and ``||vector / m||``; their product is the L2 norm."""
    largest = float(np.abs(vector).max(initial=0.0))
    if largest == 0.0:
        return 0.0, 0.0
    return largest, float(np.linalg.norm(vector / largest))


def _joined(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0)
