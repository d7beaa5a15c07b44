"""Knowledge as vectors of bounded L2 norm: soft targets, class means, label histograms.

``encode`` bounds what a client says before anything is summed; ``decode`` turns the noisy sum into
the upload of one pseudo-client. Decoding sees the noisy sum and public numbers only, so it is free.
"""

from __future__ import annotations

import numpy as np

from fedkd.errors import ConfigError, RunError
from fedkd.privacy.class_sums import ClassRows, checked_labels, whole
from fedkd.privacy.options import Release
from fedkd.privacy.payload import Histogram, Scores, Table
from fedkd.privacy.sensitivity import (
    checked,
    checked_probs,
    clip_log_probs,
    clip_logits,
    clip_rows,
    project_to_simplex,
    radius,
    softmax,
)
from fedkd.privacy.votes import ConfidentGNMax, GNMax
from fedkd.types import Arrays

SCALE = 1000
"""Whole examples that stand for a client where counts travel: shares need to be integers there."""


class SoftTargets:
    """Rows of probabilities at public temperatures T_i: ``(p_i - 1/K) / radius(T_i)``, (Q K,).

    Logits are centred and clipped to [-C, C], then softened at T_i. Probabilities lose at most what
    lies more than 2 C nats below the top, then count as softmax outputs at T = 1, to be softened at
    T_i; without temperatures at T = 1. Each row has norm 1 at most, all Q together
    ``bound = sqrt(Q)``; row i of the mean gets noise ``z sqrt(Q) radius(T_i) / expected``.
    """

    def __init__(self, part: Scores, release: Release) -> None:
        self.part, self.clip = part, release.logit_clip
        self.temperatures = _temperatures(part)
        self.radii = radius(part.classes, self.clip, self.temperatures)
        self.bound: float = part.rows**0.5

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the scaled rows as one vector; zeros where nothing was said.

        Raises:
            RunError: scores of wrong shape, not finite, or not probabilities where declared so.
        """
        shape = (self.part.rows, self.part.classes)
        if self.part.key not in arrays:
            return np.zeros(shape[0] * shape[1])
        value = arrays[self.part.key]
        if self.part.space == "probs":
            z = clip_log_probs(checked_probs(self.part.key, value, shape), self.clip)
        else:
            z = clip_logits(checked(self.part.key, value, shape), self.clip)
        p = softmax(z, self.temperatures)
        rows = (p - 1.0 / self.part.classes) / self.radii[:, None]
        # Exact already: this takes back what rounding may have added.
        return clip_rows(rows, 1.0).ravel()

    def decode(self, total: np.ndarray, expected: float, noise_std: float) -> Arrays:
        """Return the mean, projected to the simplex, as what was uploaded: at T = 1, or as logits.

        The divisor is the expected number of clients: who is missing says ``1/K``. Softened at T_i
        either one is the projected row again, its zeros lifted to the least probability that a
        clipped row can have (probabilities at T = 1 keep their zeros).
        """
        k = self.part.classes
        mean = self.radii[:, None] * total.reshape(self.part.rows, k) / expected
        p = project_to_simplex(1.0 / k + mean)
        if self.part.space == "probs" and (self.temperatures == 1.0).all():
            return {self.part.key: p.astype(np.float32)}
        r = np.exp(-2.0 * self.clip / self.temperatures)
        # A temperature near 0 makes the least probability 0 in floating point.
        least = np.maximum(r / (k - 1.0 + r), np.finfo(np.float32).tiny)[:, None]
        scores = self.temperatures[:, None] * np.log(np.maximum(p, least))
        scores -= scores.mean(1, keepdims=True)
        if self.part.space == "probs":
            scores = softmax(scores, np.ones(self.part.rows))
        return {self.part.key: scores.astype(np.float32)}


class RawLogits:
    """Logits that are averaged as they are: rows in [-C, C], the whole matrix clipped, (Q K,).

    ``bound = row_norm * sqrt(Q)`` is the largest Frobenius norm of a client's Q rows. Rows lose
    their mean, which no softmax sees.
    """

    def __init__(self, part: Scores, release: Release) -> None:
        self.part, self.clip = part, release.logit_clip
        self.bound: float = release.row_norm * part.rows**0.5

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the clipped matrix as one vector; zeros where nothing was said.

        Raises:
            RunError: scores of wrong shape or not finite.
        """
        shape = (self.part.rows, self.part.classes)
        if self.part.key not in arrays:
            return np.zeros(shape[0] * shape[1])
        z = clip_logits(checked(self.part.key, arrays[self.part.key], shape), self.clip)
        return clip_rows(z.reshape(1, -1), self.bound)[0]

    def decode(self, total: np.ndarray, expected: float, noise_std: float) -> Arrays:
        """Return the mean logits (Q, K) float32 over the expected number of clients."""
        mean = total.reshape(self.part.rows, self.part.classes) / expected
        return {self.part.key: mean.astype(np.float32)}


class TableCoder:
    """Class means as sums over clients, with what divides them: C vectors of ``D + 1``.

    ``v_c = w_c u_c`` with u_c of norm at most 1 (:class:`~fedkd.privacy.class_sums.ClassRows`), so
    ``||v||^2 <= sum_c w_c^2 = 1 = bound^2``. The weights are ``w = m / ||m||_2`` with m_c = 1 for a
    class that is held (n_c where ``counted``), 0 otherwise: raw counts would let one client be as
    loud as it likes, and 1 / sqrt(C) for everybody would waste the bound of those that hold few
    classes. So each client speaks at the full norm: one that holds P classes evenly weighs
    1 / sqrt(P) in each of them. Where all hold equally many, that is the plain mean over clients.
    Classes that are not held are zeros, and get noise as well: presence does not leak.
    """

    def __init__(self, part: Table, release: Release) -> None:
        self.part = part
        self.rows = ClassRows(part.fields, part.simplex, release)
        self.bound: float = 1.0

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the weighted vectors of all C classes, (C (D + 1),); zeros without a table.

        Raises:
            RunError: a missing array, wrong shapes, values that are not finite, rows that are not
                probabilities where declared so, labels out of range or twice, negative counts.
        """
        prefix, c = self.part.prefix + "/", self.part.classes
        dense = np.zeros((c, self.rows.width))
        names = [*self.part.fields, *(["counts"] if self.part.counted else [])]
        if prefix + "labels" not in arrays:
            stray = next((prefix + name for name in names if prefix + name in arrays), None)
            if stray is not None:
                raise RunError(f"upload holds {stray!r} without {prefix + 'labels'!r}")
            return dense.ravel()
        labels = checked_labels(prefix + "labels", arrays[prefix + "labels"], c)
        if len(np.unique(labels)) < len(labels):
            raise RunError(f"upload {prefix + 'labels'!r} names a class twice: {labels.tolist()}")
        mass = np.ones(len(labels))
        if self.part.counted:
            mass = _counts(prefix + "counts", arrays, len(labels))
        packed = self.rows.pack(arrays, len(labels), prefix)
        shares = _shares(mass)
        weights = shares / max(np.linalg.norm(shares), np.finfo(np.float64).tiny)
        dense[labels] = weights[:, None] * packed
        return clip_rows(dense.reshape(1, -1), self.bound)[0]

    def decode(self, total: np.ndarray, expected: float, noise_std: float) -> Arrays:
        """Return noisy sums over noisy counts as the strategy's own table; {} if nothing is left.

        A class is left out below ``min_count``, in units of one client that holds all classes
        evenly, and below twice the noise of a count. Counts are in thousandths of a client.
        """
        sums = total.reshape(self.part.classes, self.rows.width)
        unit = self.part.classes**-0.5
        left, fields, counts = self.rows.unpack(sums, noise_std, unit)
        if not len(left):
            return {}
        table = {"labels": left, **fields}
        if self.part.counted:
            table["counts"] = whole(SCALE * counts)
        return {f"{self.part.prefix}/{name}": value for name, value in table.items()}


class HistogramCoder:
    """Labels as shares ``n_c / n``, (C,): L1 norm 1, so L2 norm 1 at most = ``bound``."""

    def __init__(self, part: Histogram) -> None:
        self.part = part
        self.bound: float = 1.0

    def encode(self, arrays: Arrays) -> np.ndarray:
        """Return the shares; zeros where nothing was said or held.

        Raises:
            RunError: wrong shape, values that are not finite, or negative.
        """
        if self.part.key not in arrays:
            return np.zeros(self.part.classes)
        return _shares(_counts(self.part.key, arrays, self.part.classes))

    def decode(self, total: np.ndarray, expected: float, noise_std: float) -> Arrays:
        """Return counts (C,) int32 that sum to about 1000 for each expected client.

        Negative noisy shares are 0; uniform where nothing is positive.
        """
        positive = np.maximum(total, 0.0)
        shares = _shares(positive) if positive.any() else np.full(len(total), 1.0 / len(total))
        largest = np.iinfo(np.int32).max
        counts = np.clip(np.rint(SCALE * expected * shares), 0, largest)
        return {self.part.key: counts.astype(np.int32)}


KnowledgeCoder = SoftTargets | RawLogits | TableCoder | HistogramCoder | GNMax | ConfidentGNMax


def knowledge_coder(part: Scores | Table | Histogram, release: Release) -> KnowledgeCoder:
    """Return what bounds this part of an upload: votes where asked for, else by what it is.

    Raises:
        ConfigError: options or declared shapes for which no sensitivity is known.
    """
    if isinstance(part, Histogram):
        return HistogramCoder(part)
    if isinstance(part, Table):
        return TableCoder(part, release)
    if part.rows < 1 or part.classes < 2:
        raise ConfigError(f"{part.key!r}: scores need a query and 2 classes, got {part}")
    if release.votes == "gnmax":
        return GNMax(part)
    if release.votes == "confident-gnmax":
        return ConfidentGNMax(part, release)
    if part.space == "logits" and part.temperatures is None:
        return RawLogits(part, release)
    return SoftTargets(part, release)


def _temperatures(part: Scores) -> np.ndarray:
    if part.temperatures is None:
        return np.ones(part.rows)
    temperatures = np.asarray(part.temperatures, dtype=np.float64)
    if temperatures.shape != (part.rows,):
        raise ConfigError(
            f"{part.key!r} has {part.rows} queries but temperatures of shape {temperatures.shape}; "
            "give one for each query"
        )
    return temperatures


def _counts(key: str, arrays: Arrays, n: int) -> np.ndarray:
    if key not in arrays:
        raise RunError(f"upload lacks {key!r}, which the strategy declares")
    counts = checked(key, arrays[key], (n,))
    if (counts < 0).any():
        raise RunError(f"upload {key!r} holds a negative count: {counts.min():g}")
    return counts


def _shares(mass: np.ndarray) -> np.ndarray:
    """Return masses that sum to 1, or zeros; scaled first, so that no sum can overflow."""
    scaled = mass / max(mass.max(initial=0.0), np.finfo(np.float64).tiny)
    return scaled / max(scaled.sum(), np.finfo(np.float64).tiny)
