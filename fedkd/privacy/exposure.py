"""Canary exposure: how far before never-seen secrets a model ranks one that was planted, in bits.

The null level is not 0 but log2(e) = 1.44 bits, the rank has a floor that the references set, and a
fit reaches past it at its own risk; each is said with the number, so that none is read as a leak or
as safety. Carlini et al. (USENIX Security 2019). Scores are losses: LOWER means better remembered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from fedkd.errors import ConfigError, DataError, unknown
from fedkd.metrics.intervals import bootstrap_mean
from fedkd.privacy.exposure_bound import bound, level_at
from fedkd.privacy.exposure_fit import SkewNormal
from fedkd.rng import Rng
from fedkd.types import Estimate

__all__ = [
    "NULL_BITS",
    "Exposure",
    "bound",
    "exact",
    "excess",
    "exposure",
    "extrapolated",
    "interpolated",
    "level_at",
    "mean",
    "rank",
    "reduction",
]

NULL_BITS = math.log2(math.e)
"""Mean exposure of secrets that were never seen: their ranks are uniform, so -log2 of uniform."""
ESTIMATORS = ("auto", "exact", "interpolation", "extrapolation")
FEWEST = 20
"""References below which neither a rank nor a fit says anything."""
UNKNOWN_SPACE_BITS = 64.0
"""Ceiling of extrapolation where nobody knows how many secrets there could have been."""
REJECTED = 0.01
"""A fit with a smaller Kolmogorov-Smirnov p-value is not used."""
SAME = 1e-3
"""How far, relatively, two losses of one secret may differ by rounding in different batches."""
RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Exposure:
    """The exposure of each canary, in the order given.

    ``bits`` (m,) float64; ``saturated`` (m,) bool: at the ``ceiling`` (bits), so that more
    memorisation would not show; ``fit``: p-value of the fit (NaN: none was made).
    """

    bits: np.ndarray
    saturated: np.ndarray
    method: str
    ceiling: float
    fit: float = math.nan
    notes: tuple[str, ...] = ()


def rank(scores: ArrayLike, references: ArrayLike) -> np.ndarray:
    """Return the rank of each canary, 1 + #{references <= score}, (m,) int64.

    1 is the best remembered, N + 1 the worst. A tie counts against the canary. Canaries do not
    compete with each other.

    Raises:
        DataError: no canary, no reference, or a loss that is NaN or infinite.

    >>> rank([3.5, 0.0, 9.0], [1, 2, 3, 4]).tolist()
    [4, 1, 5]
    """
    found, known = _losses(scores, "canary"), np.sort(_losses(references, "reference"))
    return np.searchsorted(known, found, side="right").astype(np.int64) + 1


def exact(scores: ArrayLike, space_scores: ArrayLike) -> Exposure:
    """Return log2(n + 1) - log2(rank), with the losses of ALL secrets that there could have been.

    Give all canaries that this model saw at once: what is left of the space when they are taken
    out, n secrets, are the references. For one canary that is log2 |R| - log2 rank among all of R.
    Two canaries do not compete, and cannot both be first of |R|; hence n + 1, which keeps the null
    level and :func:`bound` right for any number of canaries.

    Raises:
        DataError: as :func:`rank`; a canary whose loss is none of the space's (up to rounding); a
            space that is all canaries.

    >>> exact([0.1], [5, 6, 0.1, 7, 0.05, 8, 9, 4]).bits.tolist()
    [2.0]
    """
    found, space = _losses(scores, "canary"), np.sort(_losses(space_scores, "reference"))
    own = _nearest(found, space)
    values, copies = np.unique(own, return_counts=True)
    upto = np.searchsorted(space, values, side="right")
    # A canary that was drawn twice is one secret of the space.
    taken = np.cumsum(np.minimum(copies, upto - np.searchsorted(space, values, side="left")))
    others = len(space) - int(taken[-1])
    if not others:
        raise DataError(
            f"exact exposure: all {len(space)} secrets of the space are canaries, so none is left "
            "to rank them against; plant fewer, or take a longer pattern or alphabet"
        )
    ranks = 1 + (upto - taken)[np.searchsorted(values, own)]
    ceiling = math.log2(others + 1)
    notes: tuple[str, ...] = ()
    if others + 1 < len(space):
        notes = (
            f"canaries do not compete: without them {others} of {len(space)} secrets are left, so "
            f"the ceiling is log2({others + 1}) = {ceiling:.2f} bits",
        )
    return Exposure(ceiling - np.log2(ranks), ranks == 1, "exact", ceiling, notes=notes)


def interpolated(scores: ArrayLike, references: ArrayLike) -> Exposure:
    """Return log2 N - log2 rank among N references: right up to log2 N bits, and no further.

    Between log2 N - log2(N + 1) and log2 N. A canary before all references is saturated: its
    exposure is at least that.

    Raises:
        DataError: as :func:`rank`.

    >>> interpolated([0.0, 3.5, 20.0], range(1, 17)).bits.round(4).tolist()
    [4.0, 2.0, -0.0875]
    """
    ranks, n = rank(scores, references), np.size(references)
    ceiling, first = math.log2(n), ranks == 1
    notes: tuple[str, ...] = ()
    if first.any():
        notes = (
            f"{first.sum()} of {len(ranks)} canaries rank before all {n} references: their "
            f"exposure is at least {ceiling:.2f} bits",
        )
    return Exposure(ceiling - np.log2(ranks), first, "interpolation", ceiling, notes=notes)


def extrapolated(scores: ArrayLike, references: ArrayLike, space: float = math.inf) -> Exposure:
    """Return -log2 F(score), F a skew-normal distribution fitted to the references.

    At most log2 ``space``, the number of secrets that there could have been (inf: unknown, at most
    64 bits). Where no fit is found, or Kolmogorov and Smirnov reject it at 1 %, the result is that
    of :func:`interpolated`, with a note. Beyond log2 N bits it rests on the fit alone.

    Raises:
        DataError: as :func:`rank`; fewer than 20 references; more than ``space``.
        ConfigError: ``space`` is below 1 or NaN.
    """
    found, known = _losses(scores, "canary"), _losses(references, "reference")
    _enough(known, space)
    fitted = SkewNormal.fit(known)
    if fitted is None:
        return _instead(found, known, "no skew-normal fit to the references converged", math.nan)
    agreement = fitted.agreement(known)
    if agreement < REJECTED:
        reason = f"the references are not skew-normal (Kolmogorov-Smirnov p = {agreement:.1g})"
        return _instead(found, known, reason, agreement)
    ceiling = math.log2(space) if space < math.inf else UNKNOWN_SPACE_BITS
    bits = np.minimum(np.abs(fitted.log_cdf(found)) / math.log(2), ceiling)
    notes = []
    if space == math.inf:
        notes.append(f"the number of possible secrets is unknown: capped at {ceiling:g} bits")
    resolved = math.log2(len(known))
    beyond = int((bits > resolved).sum())
    if beyond:
        notes.append(
            f"{beyond} of {len(bits)} canaries have more than log2({len(known)}) = {resolved:.2f} "
            "bits, which no reference reaches: that they exceed it rests on the fit alone"
        )
    saturated = bits >= ceiling
    return Exposure(bits, saturated, "extrapolation", ceiling, agreement, tuple(notes))


def exposure(
    scores: ArrayLike, references: ArrayLike, space: float = math.inf, estimator: str = "auto"
) -> Exposure:
    """Return the exposure of canaries by their losses and those of references, in bits.

    ``auto``: exact where the references are all of the space, else extrapolation where its fit
    holds, else interpolation. ``exact`` needs the canaries among the references, the others need
    references that were never planted.

    Raises:
        DataError: a loss that is NaN or infinite, no canary, fewer than 20 references or more than
            ``space``; ``exact`` with fewer than ``space``.
        ConfigError: an unknown estimator; ``space`` below 1 or NaN.
    """
    if estimator not in ESTIMATORS:
        raise unknown("estimator", estimator, ESTIMATORS, "audit.estimator")
    found, known = _losses(scores, "canary"), _losses(references, "reference")
    _enough(known, space)
    if estimator == "interpolation":
        return interpolated(found, known)
    if estimator == "extrapolation" or (estimator == "auto" and len(known) != space):
        return extrapolated(found, known, space)
    if len(known) != space:
        size = "unknown" if space == math.inf else f"{space:g}"
        raise DataError(
            f"exact exposure needs the losses of all secrets (their number: {size}), but there "
            f"are {len(known)}; score the whole space, or set audit.estimator = 'auto'"
        )
    return exact(found, known)


def mean(bits: ArrayLike, rng: Rng, confidence: float = 0.95) -> Estimate:
    """Return the mean exposure with its BCa bootstrap interval over canaries, in bits.

    It says how the mean would vary with other canaries in this model, not with other models. The
    order of canaries does not matter. Where all are saturated its width is 0: see ``saturated``.

    Raises:
        DataError: no value, or one that is not finite.
        ConfigError: ``confidence`` is not in (0, 1).
    """
    values = np.sort(_bits(bits, "exposures"))
    return bootstrap_mean(values, rng, _level(confidence), RESAMPLES)


def excess(estimate: Estimate) -> Estimate:
    """Return a mean exposure as bits above the null level: what there is to take away.

    >>> print(excess(Estimate(NULL_BITS, 1.0, 2.0, 9, "BCa bootstrap 95%")))
    0 [-0.4427, 0.5573] (n=9, BCa bootstrap 95%)
    """
    low, high = estimate.low - NULL_BITS, estimate.high - NULL_BITS
    return replace(estimate, value=estimate.value - NULL_BITS, low=low, high=high)


def reduction(
    teacher_bits: ArrayLike, student_bits: ArrayLike, rng: Rng, confidence: float = 0.95
) -> tuple[Estimate, Estimate]:
    """Return by which share a student's mean exposure s lies below the teacher's t, in two ways.

    Raw: 1 - s/t, which cannot reach 1 even for a student that knows nothing. Excess over the null
    level: (t - s) / (t - log2 e), 1 for such a student. Position i of both is one canary; canaries
    are resampled in pairs (percentile bootstrap), and their order does not matter. A share of
    nothing (denominator not above 0) is NaN, and ``method`` says why; where that happens in too
    many resamples the interval is NaN. Both exposures must come from one estimator: a student whose
    ranks are saturated, beside a teacher read from a fit, seems to leak less than it does.

    Raises:
        DataError: lengths differ; no value, or one that is not finite.
        ConfigError: ``confidence`` is not in (0, 1).
    """
    t, s = _bits(teacher_bits, "exposures (teacher)"), _bits(student_bits, "exposures (student)")
    if len(t) != len(s):
        raise DataError(
            f"reduction: {len(t)} canaries of the teacher but {len(s)} of the student; give the "
            "exposures of the same canaries, in the same order"
        )
    order = np.lexsort((s, t))
    t, s = t[order], s[order]
    picks = rng.numpy().integers(len(t), size=(RESAMPLES, len(t)))
    pairs = np.vstack([np.stack([t.mean(), s.mean()]), np.stack([t[picks], s[picks]]).mean(2).T])
    level = _level(confidence)
    return _share(pairs, 0.0, len(t), level), _share(pairs, NULL_BITS, len(t), level)


def _share(pairs: np.ndarray, floor: float, n: int, confidence: float) -> Estimate:
    """Return (t - s) / (t - floor) of the first row of ``pairs``, its interval from the others."""
    label = f"paired bootstrap {100 * confidence:g}%"
    gain, base = pairs[:, 0] - pairs[:, 1], pairs[:, 0] - floor
    if not base[0] > 0:
        what = f"the null level of {floor:.2f}" if floor else "0"
        reason = f"undefined: the teacher's mean, {pairs[0, 0]:.3g} bits, is not above {what}"
        return Estimate(math.nan, math.nan, math.nan, n, reason)
    shares = np.divide(gain, base, out=np.full_like(gain, math.nan), where=base > 0)
    lost, tail = np.isnan(shares[1:]), (1 - confidence) / 2
    # A share of nothing could have been anything: it counts as worst at both ends.
    low = np.quantile(np.where(lost, -math.inf, shares[1:]), tail, method="lower")
    high = np.quantile(np.where(lost, math.inf, shares[1:]), 1 - tail, method="higher")
    if n == 1 or not math.isfinite(low) or not math.isfinite(high):
        reason = label if n == 1 else f"{label}: none, what the teacher shows may be nothing"
        return Estimate(float(shares[0]), math.nan, math.nan, n, reason)
    return Estimate(float(shares[0]), float(low), float(high), n, label)


def _instead(scores: np.ndarray, references: np.ndarray, reason: str, fit: float) -> Exposure:
    found = interpolated(scores, references)
    return replace(found, fit=fit, notes=(f"{reason}: interpolated instead", *found.notes))


def _nearest(scores: np.ndarray, space: np.ndarray) -> np.ndarray:
    """Return for each canary the loss in the sorted ``space`` that is its own."""
    above = np.searchsorted(space, scores).clip(0, len(space) - 1)
    sides = np.stack([space[above], space[np.maximum(above - 1, 0)]])
    own = sides[np.abs(sides - scores).argmin(axis=0), np.arange(len(scores))]
    away = np.abs(own - scores) > SAME * np.maximum(1.0, np.abs(scores))
    if away.any():
        first = int(away.argmax())
        raise DataError(
            f"exact exposure: canary {first} has the loss {scores[first]:.6g}, which none of the "
            f"{len(space)} secrets of the space has ({away.sum()} such canaries); score the whole "
            "space, canaries included, with the same model"
        )
    return own


def _enough(references: np.ndarray, space: float) -> None:
    if not space >= 1:
        raise ConfigError(f"space = {space!r}: the number of secrets, at least 1 (inf: unknown)")
    if len(references) < FEWEST:
        raise DataError(
            f"{len(references)} references are too few to rank canaries among: at least {FEWEST} "
            "are needed, 1000 or more tell apart; raise canaries.references"
        )
    if len(references) > space:
        raise DataError(
            f"{len(references)} references, but only {space:g} secrets exist: some are there "
            "twice; lower canaries.references, or take a longer pattern or alphabet"
        )


def _losses(values: ArrayLike, what: str) -> np.ndarray:
    losses = _vector(values, f"{what} losses")
    if not losses.size:
        raise DataError(f"there is no {what} to score: plant canaries (see canaries in the config)")
    bad = np.flatnonzero(~np.isfinite(losses))
    if bad.size:
        raise DataError(
            f"{what} losses: {losses[bad[0]]} at position {bad[0]} ({bad.size} of {losses.size} "
            "are not finite); the model diverged, or its probabilities underflowed: lower the "
            "learning rate, and take losses from log-probabilities"
        )
    return losses


def _bits(values: ArrayLike, what: str) -> np.ndarray:
    bits = _vector(values, what)
    if not bits.size:
        raise DataError(f"{what}: no canary, so there is no mean; plant some on this side")
    if not np.isfinite(bits).all():
        raise DataError(f"{what}: {(~np.isfinite(bits)).sum()} of {bits.size} are not finite")
    return bits


def _vector(values: ArrayLike | Sequence[float], what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise DataError(f"{what}: one number a canary is needed, not the shape {array.shape}")
    return array


def _level(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence = {confidence!r}: must be between 0 and 1, such as 0.95")
    return confidence
