"""Attacks what was released itself: arrays that a network need not even have learned from.

Soft targets or weights of other runs, whose coins are known, show in which direction each canary
moves them; the target's release either lies in that direction or does not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from fedkd.errors import ConfigError, DataError
from fedkd.privacy.auditing.lira import finite, refuse_none, usable

LEAST = 3
"""References: with fewer nothing is left from which to see how a projection scatters."""
PRIOR = 4
"""Degrees of freedom with which the scatter common to all canaries counts for each of them."""
ROUNDING = 1e-12
BLOCK = 1 << 16


def released(target: ArrayLike, references: ArrayLike, inside: ArrayLike) -> np.ndarray:
    """Return how far the target's release lies on each canary's side, (m,) float64, higher = in.

    Canary i moves releases by ``d = mean of its runs - mean of the others'``; the score is
    ``<target - midpoint, d> / s``. ``target`` (D,), ``references`` (K, D): arrays of one kind,
    flattened in one order; ``inside`` (K, m): the references' coins. The target's are not needed.

    ``s^2``: variance of ``<reference - mean of its side, d>``, with K - 2 degrees of freedom; as
    those are few, what all canaries have in common (variance over |d|^2) counts as 4 further ones
    (a moderated t, after Smyth 2004), so that no canary is suspected for a lucky small s.
    Coordinates that are equal in all references are ignored: they teach no direction.

    A canary that was in all or in none of the references has no direction: NaN, and
    :func:`~fedkd.privacy.auditing.lira.usable` tells which; of K fair coins a share ``2^(1-K)``
    (4: 13 %, 8: under 1 %). A direction also holds those of the m - 1 other canaries, by chance:
    of canaries that move releases alike, in and out are only about ``sqrt(K / m)`` standard
    deviations apart, however much is released (K = 8, m = 240: AUC about .55). So a weak
    result with few references says little; give arrays, or canaries, that belong together.

    Raises:
        ConfigError: fewer than 3 references; no canary has a direction.
        DataError: shapes do not fit, values are not finite, the references are all alike.
    """
    aim, known, member = np.asarray(target), np.asarray(references), np.asarray(inside)
    _check(aim, known, member)
    judged = usable(member)
    refuse_none(judged, len(known), "released")
    gram, towards = _products(aim, known)
    coins = member[:, judged].astype(np.float64)
    with_, without = coins / coins.sum(axis=0), (1 - coins) / (1 - coins).sum(axis=0)
    direction, midpoint = with_ - without, (with_ + without) / 2
    # Everything lies in the span of the references, so K x K products are all that is needed.
    along = gram @ direction
    score = towards @ direction - (midpoint * along).sum(axis=0)
    means = np.where(coins > 0, (with_ * along).sum(axis=0), (without * along).sum(axis=0))
    freedom = len(known) - 2
    scatter = ((along - means) ** 2).sum(axis=0)
    length = (direction * along).sum(axis=0)
    common = scatter.sum() / (freedom * length.sum()) if length.sum() > 0 else 0.0
    spread = (scatter + PRIOR * common * length) / (freedom + PRIOR)
    if not spread.max() > 0:
        raise DataError(
            "releases of the reference runs do not scatter beyond their coins, so there is nothing "
            "to compare a difference with; give runs of other seeds"
        )
    # A canary whose two means coincide has no direction to lie in.
    clear = spread > ROUNDING * spread.max()
    scores = np.zeros(judged.sum())
    scores[clear] = score[clear] / np.sqrt(spread[clear])
    result = np.full(judged.shape, np.nan)
    result[judged] = scores
    return result


def _check(target: np.ndarray, references: np.ndarray, inside: np.ndarray) -> None:
    shapes = f"{target.shape}, {references.shape} and {inside.shape}"
    fits = target.ndim == 1 and references.ndim == 2 and references.shape[1:] == target.shape
    if not fits or inside.ndim != 2 or len(inside) != len(references) or not inside.size:
        raise DataError(
            "the attack on releases needs (D,) of the target, (K, D) of the references and (K, m) "
            f"coins, not {shapes}; flatten the same arrays in the same order in all runs"
        )
    if inside.dtype != bool:
        raise DataError(f"coins of references must be true or false, not {inside.dtype}")
    if len(references) < LEAST:
        raise ConfigError(
            f"the attack on releases needs at least {LEAST} reference runs, not {len(references)}: "
            "two give all canaries one and the same direction; audit.reference_models = 8 is a "
            "sensible start"
        )


def _products(target: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (K, K) products of the references and (K,) with the target, about their mean."""
    gram = np.zeros((len(references), len(references)))
    towards = np.zeros(len(references))
    for aim, known in _blocks(target, references):
        moved = np.ptp(known, axis=0) > 0
        centre = known[:, moved].mean(axis=0)
        centred = known[:, moved] - centre
        gram += centred @ centred.T
        towards += centred @ (aim[moved] - centre)
    if not gram.any():
        raise DataError(
            "all reference runs released the same arrays; give runs of other seeds, each with "
            "coins of its own"
        )
    return gram, towards


def _blocks(target: np.ndarray, references: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Give columns of both in float64, few enough at once that releases of any size fit."""
    for start in range(0, target.size, BLOCK):
        columns = slice(start, start + BLOCK)
        yield (
            finite(target[columns], "the target's release"),
            finite(references[:, columns], "the references' releases"),
        )
