"""Noisy sums and noisy counts by class: the sound release of class means.

A noisy mean with an exact count, or only the classes that are held, would leak; so sums and counts
of all classes get noise and are divided afterwards. Rows of one class are one vector of norm 1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedkd.errors import ConfigError, RunError
from fedkd.privacy.options import Release
from fedkd.privacy.sensitivity import checked, checked_probs, clip_rows, project_to_simplex
from fedkd.rng import Rng
from fedkd.types import Arrays

FLOOR = 2.0
"""A class whose noisy count is below this many standard deviations of the noise is left out."""
_LARGEST = np.iinfo(np.int32).max


class ClassRows:
    """How the fields of one class become one vector (D + 1,) of L2 norm at most 1, and back.

    ``u = [sqrt(1 - b) x_f / (R_f sqrt(F)) for each of F fields, sqrt(b)]``, b = ``count_share``.
    Simplex fields of width d are centred by 1/d, which is public, and have R = sqrt(1 - 1/d);
    other rows are clipped to R = ``row_norm``. The last coordinate counts.
    """

    def __init__(
        self, fields: Mapping[str, int], simplex: frozenset[str], release: Release
    ) -> None:
        if release.count_share >= 1:
            raise ConfigError(
                "privacy.release.count_share = 1 leaves nothing to the rows of a table; set it "
                "below 1, for instance 0.25"
            )
        thin = [name for name in fields if name in simplex and fields[name] < 2]
        if thin:
            raise ConfigError(f"probabilities {', '.join(thin)} need 2 classes at least")
        self.fields, self.simplex, self.release = dict(fields), simplex, release
        self.width = sum(fields.values()) + 1
        self._count = release.count_share**0.5
        self._rows = (1.0 - release.count_share) ** 0.5 / max(1, len(fields)) ** 0.5

    def _radius(self, name: str) -> float:
        if name in self.simplex:
            return (1.0 - 1.0 / self.fields[name]) ** 0.5
        return self.release.row_norm

    def pack(self, values: Mapping[str, np.ndarray], n: int, prefix: str = "") -> np.ndarray:
        """Return the rows of all fields as vectors (n, D + 1), each of norm at most 1.

        Raises:
            RunError: a field is missing, has another shape than (n, d) or is not finite, or rows of
                a simplex field are not distributions.
        """
        parts = []
        for name, width in self.fields.items():
            key = prefix + name
            if key not in values:
                raise RunError(f"upload lacks {key!r}, which the strategy declares")
            if name in self.simplex:
                rows = checked_probs(key, values[key], (n, width)) - 1.0 / width
            else:
                rows = checked(key, values[key], (n, width))
            reach = self._radius(name)
            parts.append(clip_rows(rows, reach) * (self._rows / reach))
        return np.concatenate([*parts, np.full((n, 1), self._count)], axis=1)

    def unpack(
        self, sums: np.ndarray, noise_std: float, unit: float = 1.0
    ) -> tuple[np.ndarray, Arrays, np.ndarray]:
        """Return (classes left (P,), fields (P, d) float32, their noisy counts (P,)).

        ``sums`` (C, D + 1) are noisy sums of weighted vectors, ``noise_std`` that of a coordinate.
        A class is left out where its noisy count is below ``min_count`` times ``unit``, or below
        ``FLOOR`` times the noise of a count: there the ratio would be noise over noise. All of it
        looks at noisy sums and public numbers only.
        """
        counts = sums[:, -1] / self._count
        least = max(self.release.min_count * unit, FLOOR * noise_std / self._count)
        left = np.flatnonzero((counts > 0) & (counts >= least * (1.0 - 1e-9)))
        fields, at = {}, 0
        for name, width in self.fields.items():
            rows = sums[left, at : at + width] * (self._radius(name) / self._rows)
            rows = rows / counts[left][:, None]
            if name in self.simplex:
                rows = project_to_simplex(rows + 1.0 / width)
            fields[name] = rows.astype(np.float32)
            at += width
        return left.astype(np.int32), fields, counts[left]


def whole(counts: np.ndarray) -> np.ndarray:
    """Return counts as int32, at least 1: what a table of class means carries."""
    return np.clip(np.rint(counts), 1, _LARGEST).astype(np.int32)


def class_vector_sums(layout: ClassRows, packed: np.ndarray, y: np.ndarray, c: int) -> np.ndarray:
    """Return the exact sums (C, D + 1) of packed examples by class; sensitivity 1 (add/remove)."""
    sums = np.zeros((c, layout.width))
    np.add.at(sums, y, packed)
    return sums


def noisy_class_means(
    values: Mapping[str, np.ndarray],
    y: np.ndarray,
    classes: int,
    *,
    simplex: frozenset[str],
    release: Release,
    noise_multiplier: float,
    rng: Rng,
    counted: bool,
) -> Arrays:
    """Return the means by class of a client's own examples, private for each example.

    ``values`` maps each field to one row an example, (n, d); ``y`` (n,) are labels. Returned as a
    strategy sends them: ``labels`` (P,) int32, the fields (P, d) float32, ``counts`` (P,) int32
    where ``counted``; nothing where no class stands out of the noise.

    An example touches one class by a vector of norm at most 1 (:class:`ClassRows`), so the L2
    sensitivity of all sums and counts together is 1 for add/remove and 2 for replace-one (the
    accountant halves the multiplier). Each coordinate of all ``classes`` gets noise of std
    ``noise_multiplier * 1``. One call is one Gaussian release on all of the client's examples, at
    rate 1.

    This is private only if the map from an example to its row does not depend on that example: a
    frozen or public encoder, or one trained by DP-SGD whose cost is added. Limit: noise 0 and wide
    rows give the exact means of the classes that are held.

    Raises:
        RunError: arrays of wrong shape, not finite, labels out of range.
        ConfigError: noise that is negative or not finite.
    """
    _check_noise(noise_multiplier)
    labels = _labels(y, classes)
    widths = {}
    for name, rows in values.items():
        if np.ndim(rows) != 2:
            raise RunError(f"upload {name!r} has shape {np.shape(rows)}; needs one row an example")
        widths[name] = np.shape(rows)[1]
    layout = ClassRows(widths, simplex & frozenset(widths), release)
    sums = class_vector_sums(layout, layout.pack(values, len(labels)), labels, classes)
    noise = rng.numpy().normal(size=sums.shape)
    left, fields, counts = layout.unpack(sums + noise_multiplier * noise, noise_multiplier)
    if not len(left):
        return {}
    return {"labels": left, **fields, **({"counts": whole(counts)} if counted else {})}


def noisy_histogram(
    y: np.ndarray, classes: int, *, noise_multiplier: float, rng: Rng
) -> np.ndarray:
    """Return ``max(0, round(n_c + N(0, z^2)))`` for each class, int32 (C,).

    L2 sensitivity 1 for adding or removing an example: std = ``noise_multiplier`` * 1. One Gaussian
    release on all examples, rate 1.

    Raises:
        RunError: labels out of range.
        ConfigError: noise that is negative or not finite.
    """
    _check_noise(noise_multiplier)
    exact = np.bincount(_labels(y, classes), minlength=classes)
    noisy = exact + noise_multiplier * rng.numpy().normal(size=classes)
    return np.clip(np.rint(noisy), 0, _LARGEST).astype(np.int32)


def _check_noise(noise_multiplier: float) -> None:
    if not (np.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ConfigError(
            f"privacy.release.noise_multiplier = {noise_multiplier}: Input should be a number of 0 "
            "or more"
        )


def _labels(y: np.ndarray, classes: int) -> np.ndarray:
    return checked_labels("labels", np.asarray(y), classes)


def checked_labels(key: str, y: np.ndarray, classes: int) -> np.ndarray:
    """Return labels (n,) as int64, or raise a RunError that names what is wrong with them."""
    if y.ndim != 1 or (y.dtype.kind not in "iu" and y.size):
        raise RunError(f"{key!r} must be whole numbers (n,); got {y.dtype} of shape {y.shape}")
    if y.size and not (y.min() >= 0 and y.max() < classes):
        raise RunError(f"{key!r} names classes out of 0 to {classes - 1}: {y.min()} to {y.max()}")
    return y.astype(np.int64)
