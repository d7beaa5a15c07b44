"""How much one contribution can change: exact radii of clipped softmax outputs, and safe clipping.

Temperature scales what a soft target tells, clipping bounds it; only both together have a
sensitivity. The popular one-hot formula is too small at high temperatures, so it is not used.
"""

from __future__ import annotations

import functools
from typing import overload

import numpy as np

from fedkd.errors import ConfigError, RunError


def clip_logits(z: np.ndarray, clip: float) -> np.ndarray:
    """Return ``clip(z - mean(z), -C, C)`` for each row of ``z`` (..., K), in float64.

    >>> clip_logits(np.array([1.0, 3.0, 20.0]), 5.0).tolist()
    [-5.0, -5.0, 5.0]
    """
    z = np.asarray(z, dtype=np.float64)
    # The mean of halves cannot overflow where the sum of the largest floats would.
    half = z / 2.0
    return np.clip((half - half.mean(-1, keepdims=True)) * 2.0, -clip, clip)


def clip_log_probs(probs: np.ndarray, clip: float) -> np.ndarray:
    """Return log-probabilities with ``2 C`` at most between the largest and the smallest.

    ``max(log p, max(log p) - 2 C)`` for each row (..., K): only classes that are less likely than
    ``exp(-2 C)`` times the likeliest are lifted. Up to a constant, which a softmax does not see,
    the rows lie in [-C, C] as those of :func:`clip_logits` do.
    """
    top = probs.max(-1, keepdims=True)
    z = np.log(np.maximum(probs / top, np.exp(-700.0)))
    return np.maximum(z, -2.0 * clip)


def softmax(z: np.ndarray, temperature: np.ndarray | float = 1.0) -> np.ndarray:
    """Return ``softmax(z / T)`` over the last axis in float64; T is a number or one for a row."""
    t = np.asarray(temperature, dtype=np.float64)
    z = np.asarray(z, dtype=np.float64) / (t[..., None] if t.ndim else t)
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@overload
def radius(classes: int, clip: float, temperature: float) -> float: ...
@overload
def radius(classes: int, clip: float, temperature: np.ndarray) -> np.ndarray: ...
def radius(classes: int, clip: float, temperature: float | np.ndarray) -> float | np.ndarray:
    """Return the largest ``||softmax(z / T) - 1/K||_2`` over z in [-C, C]^K: add/remove.

    ``max_s (1 - r) sqrt(s (K - s) / K) / (s + (K - s) r)`` with ``r = exp(-2 C / T)``.

    The image of the box is the polytope of distributions with ``p_i <= p_j / r``: its vertices have
    s coordinates at the top and all others at the bottom, and a convex function is largest at a
    vertex. This is exact, and reached by logits that are centred by their mean before clipping.
    Limits: T -> 0 gives ``sqrt(1 - 1/K)``, T -> inf gives 0.

    Raises:
        ConfigError: fewer than two classes, a clip or temperature that is not a positive number, or
            a temperature so high that rows cannot be told apart in floating point.
    """
    r, gap = _ratio(classes, clip, temperature)
    s = np.arange(1, classes, dtype=np.float64)
    spread = np.sqrt(s * (classes - s) / classes)
    found = (gap[..., None] * spread / (s + (classes - s) * r[..., None])).max(-1)
    return found if isinstance(temperature, np.ndarray) else float(found)


@overload
def diameter(classes: int, clip: float, temperature: float) -> float: ...
@overload
def diameter(classes: int, clip: float, temperature: np.ndarray) -> np.ndarray: ...
def diameter(classes: int, clip: float, temperature: float | np.ndarray) -> float | np.ndarray:
    """Return the largest ``||softmax(z / T) - softmax(z' / T)||_2`` over [-C, C]^K: replace-one.

    Exact: the largest distance of two vertices (s and t coordinates at the top, with as few in
    common as can be, since the inner product grows with each). See :func:`radius`, also for errors.
    Limits: T -> 0 gives ``sqrt(2)``. The formula between two one-hot vertices,
    ``sqrt(2) (R - 1) / (R + K - 1)`` with ``R = exp(2 C / T)``, is too small for hot rows.

    >>> round(diameter(10, 5.0, 10.0), 5)
    0.29227
    """
    if not isinstance(temperature, np.ndarray):
        return _diameter(classes, float(clip), float(temperature))
    values, where = np.unique(temperature, return_inverse=True)
    found = np.array([_diameter(classes, float(clip), float(t)) for t in values])
    return found[where].reshape(temperature.shape)


@functools.lru_cache(maxsize=65536)
def _diameter(classes: int, clip: float, temperature: float) -> float:
    r, gap = _ratio(classes, clip, temperature)
    k = float(classes)
    s = np.arange(1, classes, dtype=np.float64)[:, None]
    t = s.T
    both = np.maximum(0.0, s + t - k)
    # Differences of coordinates times both normalizers, with the common factor 1 - r taken out:
    # subtracting the probabilities themselves would cancel to nothing at high temperatures.
    squares = (
        both * (t - s) ** 2
        + (s - both) * (t + r * (k - s)) ** 2
        + (t - both) * (s + r * (k - t)) ** 2
        + (k - s - t + both) * (r * (t - s)) ** 2
    )
    normalizers = (s + (k - s) * r) * (t + (k - t) * r)
    return float((gap * np.sqrt(squares) / normalizers).max())


def _ratio(
    classes: int, clip: float, temperature: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return ``r = exp(-2 C / T)``, the least ratio of two probabilities, and ``1 - r``."""
    t = np.asarray(temperature, dtype=np.float64)
    if classes < 2:
        raise ConfigError(f"soft targets over {classes} class(es) have no sensitivity; need 2")
    if not (np.isfinite(clip) and clip > 0):
        raise ConfigError(f"privacy.release.logit_clip = {clip}: Input should be a number above 0")
    if not (np.isfinite(t).all() and (t > 0).all() and (t <= 1e12 * clip).all()):
        raise ConfigError(
            "temperatures of soft targets must be above 0 and at most 1e12 times "
            f"privacy.release.logit_clip; they range from {t.min():.4g} to {t.max():.4g}"
        )
    with np.errstate(over="ignore", under="ignore"):
        exponent = -2.0 * clip / t
        return np.exp(exponent), -np.expm1(exponent)


def clip_rows(rows: np.ndarray, norm: float) -> np.ndarray:
    """Return the rows (n, d) scaled down to an L2 norm of at most ``norm``; shorter ones stay."""
    rows = np.asarray(rows, dtype=np.float64)
    largest = np.abs(rows).max(-1, initial=0.0, keepdims=True)
    # Norms of scaled rows: squares of very large or very small numbers would leave the range.
    unit = np.where(largest > 0, largest, 1.0)
    scaled = rows / unit
    length = np.linalg.norm(scaled, axis=-1, keepdims=True)
    fits = length <= norm / unit
    return np.where(fits, rows, scaled * (norm / np.where(fits, 1.0, length)))


def project_to_simplex(rows: np.ndarray) -> np.ndarray:
    """Return the nearest distribution (Euclidean) to each row of ``rows`` (n, K), in float64.

    ``p_i = max(v_i - theta, 0)`` with theta such that the row sums to 1. Post-processing: free.
    Source: Duchi et al., Efficient Projections onto the l1-Ball, ICML 2008, figure 1.

    >>> project_to_simplex(np.array([[0.9, 0.5, -3.0]])).round(2).tolist()
    [[0.7, 0.3, 0.0]]
    """
    rows = np.asarray(rows, dtype=np.float64)
    # A constant changes nothing, and with the largest at 0 huge rows keep their digits.
    rows = rows - rows.max(1, keepdims=True)
    falling = -np.sort(-rows, axis=1)
    rank = np.arange(1, rows.shape[1] + 1)
    excess = (np.cumsum(falling, axis=1) - 1.0) / rank
    support = (falling > excess).sum(1)
    theta = excess[np.arange(len(rows)), support - 1]
    p = np.maximum(rows - theta[:, None], 0.0)
    return p / p.sum(1, keepdims=True)


def checked(key: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return an uploaded array as float64, or raise a RunError that names it.

    Raises:
        RunError: not numbers, another shape than ``shape``, or values that are not finite.
    """
    value = np.asarray(value)
    if value.dtype.kind not in "iufb":
        raise RunError(f"upload {key!r} holds {value.dtype}, not numbers; nothing can bound it")
    if value.shape != shape:
        raise RunError(
            f"upload {key!r} has shape {value.shape}, but the strategy declares {shape}; noise "
            "must cover exactly what is declared"
        )
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        raise RunError(
            f"upload {key!r} is not finite (nan or inf), so its influence cannot be bounded; "
            "lower clients.training.lr, or set clients.training.max_grad_norm"
        )
    return value.astype(np.float64)


def checked_probs(key: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return uploaded rows of probabilities as float64, exactly normalized.

    Raises:
        RunError: as :func:`checked`, or rows that are not distributions.
    """
    rows = checked(key, value, shape)
    low = rows.min(initial=0.0)
    with np.errstate(over="ignore"):
        off = np.abs(rows.sum(-1) - 1.0).max(initial=0.0)
    if low < -1e-6 or not off <= 1e-3:
        raise RunError(
            f"upload {key!r} is declared as probabilities, but has rows whose sum is off by "
            f"{off:.3g} and a smallest value of {low:.3g}"
        )
    rows = np.maximum(rows, 0.0)
    return rows / rows.sum(-1, keepdims=True)
