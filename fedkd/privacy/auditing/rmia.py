"""Membership by pairs: a canary against public examples, each against what other models make of it.

One such model is enough, so it is the attack to begin with where references are dear.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp
from scipy.stats import rankdata

from fedkd.errors import ConfigError, DataError
from fedkd.privacy.auditing.lira import checked, refuse_none, usable

DEFAULT = 0.3
"""The offline scale a where no reference can be attacked to find it."""
GRID = tuple(i / 10 for i in range(11))


def rmia(
    target_p: ArrayLike,
    reference_p: ArrayLike,
    inside: ArrayLike,
    population_target_p: ArrayLike,
    population_reference_p: ArrayLike,
    *,
    online: bool,
    gamma: float = 1.0,
    a: float | None = None,
) -> np.ndarray:
    """Return the share of public examples z that each canary x beats, (m,) in (0, 1), higher = in.

    ``x beats z`` where ``p(x|target) / p(x) > gamma p(z|target) / p(z)``. All arguments are natural
    log probabilities: canaries (m,) and (K, m), population (N,) and (K, N) that no model was
    trained on; of text the mean over tokens, since ``a`` fits no probability of a whole sequence.

    ``p(x)`` online: mean of the mean over references with x and that over those without (z: over
    all). Offline: ``((1 + a) mean_without + (1 - a)) / 2``, of z too; ``a`` by :func:`tune` where
    it is not given; a = 1 compares with the references alone, a = 0 hardly with them. NaN: a canary
    without a reference run of a side needed (see :func:`~fedkd.privacy.auditing.lira.usable`).

    Zarifzadeh, Liu and Shokri, ICML 2024. Unlike their code, canaries that beat equally many z are
    ordered by their own ratio, ``(number beaten + a part below 1) / (N + 1)``: else all that beat
    every z would tie, which hides what an attack does at low false-positive rates. ``gamma`` moves
    shares, not the order.

    Raises:
        DataError: shapes do not fit, values are not finite or no logarithms of probabilities.
        ConfigError: gamma or a out of range; no canary can be judged.
    """
    x, known, member = checked(target_p, reference_p, inside, "log probabilities")
    z, public, _ = checked(
        population_target_p,
        population_reference_p,
        np.zeros(np.shape(population_reference_p), dtype=bool),
        "log probabilities of the population",
    )
    _probabilities(x, known, z, public)
    if len(public) != len(known):
        raise DataError(f"{len(known)} references score canaries, but {len(public)} the population")
    if not gamma > 0 or not np.isfinite(gamma):
        raise ConfigError(f"gamma = {gamma} must be above 0; 1 is usual")
    if a is not None and not 0 <= a <= 1:
        raise ConfigError(f"a = {a} must be between 0 and 1, for instance {DEFAULT}")
    judged = usable(member, online=online)
    refuse_none(judged, len(known), "online" if online else "offline")
    never = np.zeros(public.shape, dtype=bool)
    scale = DEFAULT if online else tune(known, member) if a is None else a
    x, known, member = x[judged], known[:, judged], member[:, judged]
    if online:
        own, others = x - _balanced(known, member), z - _mean(public, ~never)
    else:
        own, others = x - _offline(known, member, scale), z - _offline(public, never, scale)
    scores = np.full(judged.shape, np.nan)
    scores[judged] = _beaten(own, others, float(np.log(gamma)))
    return scores


def tune(reference_p: ArrayLike, inside: ArrayLike) -> float:
    """Return the offline scale a in 0, .1, ... 1 that serves best against the references.

    Each reference in turn is attacked with the others; the mean AUC decides, and of equal ones the
    a nearest to .3. That is also the answer where none can be attacked: one reference, or
    references that all have the same side of every canary. The target plays no part.
    """
    known, member = np.asarray(reference_p, dtype=np.float64), np.asarray(inside, dtype=bool)
    gained: dict[float, list[float]] = {a: [] for a in GRID}
    for k in range(len(known)):
        others = np.arange(len(known)) != k
        judged = usable(member[others], online=False)
        into = member[k, judged]
        if not 0 < into.sum() < into.size:
            continue
        logs, sides = known[others][:, judged], member[others][:, judged]
        for a in GRID:
            gained[a].append(_auc(known[k, judged] - _offline(logs, sides, a), into))
    if not gained[DEFAULT]:
        return DEFAULT
    return max(GRID, key=lambda a: (round(float(np.mean(gained[a])), 9), -abs(a - DEFAULT)))


def _offline(known: np.ndarray, member: np.ndarray, a: float) -> np.ndarray:
    """Return ``log(((1 + a) mean_without + 1 - a) / 2)``."""
    without = _mean(known, ~member) + np.log1p(a)
    constant = np.log1p(-a) if a < 1 else -np.inf
    return np.logaddexp(without, constant) - np.log(2)


def _balanced(known: np.ndarray, member: np.ndarray) -> np.ndarray:
    """Return the log of the mean of both sides' means."""
    return np.logaddexp(_mean(known, member), _mean(known, ~member)) - np.log(2)


def _mean(logs: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return the log of the mean probability over the chosen rows, at least one of each column."""
    return logsumexp(np.where(chosen, logs, -np.inf), axis=0) - np.log(chosen.sum(axis=0))


def _beaten(own: np.ndarray, others: np.ndarray, margin: float) -> np.ndarray:
    """Return the share of ``others + margin`` below each, ties ordered by ``own``."""
    count = np.searchsorted(np.sort(others + margin), own, side="left")
    # Monotone in own and strictly between 0 and 1; keeps its digits longer than a sigmoid does.
    within = (1 + own / (1 + np.abs(own))) / 2
    return (count + within) / (len(others) + 1)


def _auc(scores: np.ndarray, inside: np.ndarray) -> float:
    into = int(inside.sum())
    above = rankdata(scores)[inside].sum() - into * (into + 1) / 2
    return float(above / (into * (scores.size - into)))


def _probabilities(*logs: np.ndarray) -> None:
    highest = max(float(values.max()) for values in logs)
    if highest > 1e-9:
        raise DataError(
            f"a log probability is {highest:.4g}, which is above 0; give natural logarithms of "
            "probabilities (minus the loss in nats), not probabilities or logits"
        )
