"""Likelihood ratios of membership: how a canary scores where it was planted and where it was not.

Other runs of the same experiment with other coins are the reference models: each has about half of
the canaries. What they cannot judge is NaN, never a guess; :func:`usable` says beforehand which.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from fedkd.errors import ConfigError, DataError

ENOUGH = 64
"""References from which a canary's own variance is better known than the common one."""
FLOOR = 1e-6
"""Least standard deviation of a canary of its own, as a share of the common one."""
ROUNDING = 1e-12
"""What scores may differ by, relative to the largest, and still count as equal."""


def phi(log_probs: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Return logit-scaled confidences ``log p_y - log sum_{k != y} p_k``, (n,) float64.

    ``log_probs`` is (n, C), natural logarithms; logits give the same, since what normalises them
    cancels. Near normal over models, as p_y itself is not: Carlini et al. (S&P 2022), Sec. IV-C.

    Raises:
        DataError: shapes do not fit, fewer than 2 classes, labels out of range; a value that is
            not finite, as where a float32 probability was rounded to 0 or 1.

    >>> phi([[0.0, 0.0], [2.0, 0.0]], [0, 0])
    array([0., 2.])
    """
    logs, classes = np.array(log_probs, dtype=np.float64), np.asarray(labels)
    if logs.ndim != 2 or logs.shape[1] < 2 or classes.shape != logs.shape[:1]:
        raise DataError(
            f"confidences need (n, C) log probabilities of at least 2 classes and (n,) labels, "
            f"not {logs.shape} and {classes.shape}"
        )
    if classes.size and not 0 <= classes.min() <= classes.max() < logs.shape[1]:
        raise DataError(
            f"labels from {classes.min()} to {classes.max()} do not fit {logs.shape[1]} classes"
        )
    rows = np.arange(len(logs))
    own = logs[rows, classes]
    logs[rows, classes] = -np.inf
    # Checked beforehand, since others of -inf alone would give an infinite confidence.
    return finite(own, "log probabilities of the labels") - finite(
        logsumexp(logs, axis=1), "log probabilities of the other labels"
    )


def lira(
    target: ArrayLike,
    references: ArrayLike,
    inside: ArrayLike,
    *,
    online: bool,
    fixed_variance: bool | None = None,
) -> np.ndarray:
    """Return the score of each canary under the target model, (m,) float64; higher: more likely in.

    Online ``log N(x | in) - log N(x | out)``; offline ``(x - mean_out) / std_out``, which orders
    canaries as ``1 - Pr[N(out) > x]`` does, but never rounds to equal values. ``target`` (m,) and
    ``references`` (K, m) hold phi (images) or minus the loss of a token (text); ``inside`` (K, m)
    what each reference was trained on. NaN: a canary without a reference run of a side needed.

    A side's mean is its median; ``fixed_variance`` (default: below 64 references) takes one
    variance for all canaries of a side, pooled within canaries. Scores need no target's coins.
    Carlini et al., S&P 2022, Algorithm 1 and Sec. V. Unlike their code: the out side has its own
    variance (theirs is that of the in side), means of canaries do not inflate the common variance,
    and offline is one-sided as in the paper (their code also suspects what scores too low).

    Raises:
        DataError: shapes do not fit, values are not finite, references are one and the same model.
        ConfigError: no canary can be judged; the message says how many references are needed.
    """
    x, known, member = checked(target, references, inside)
    fixed = len(known) < ENOUGH if fixed_variance is None else fixed_variance
    judged = usable(member, online=online, least=1 if fixed else 2)
    refuse_none(judged, len(known), "online" if online else "offline", 1 if fixed else 2)
    out = _Side(known, ~member)
    if not online:
        spread = _spread(out, None, fixed)
        return np.where(judged, (x - out.centre) / spread, np.nan)
    into = _Side(known, member)
    scores = _log_normal(x, into.centre, _spread(into, out, fixed))
    scores -= _log_normal(x, out.centre, _spread(out, into, fixed))
    return np.where(judged, scores, np.nan)


def usable(inside: ArrayLike, *, online: bool = True, least: int = 1) -> np.ndarray:
    """Return which canaries the reference runs can judge, (m,) bool, from their coins alone.

    Online: at least ``least`` runs with the canary and as many without; offline: without. Of fair
    coins K runs judge a share ``1 - 2^(1-K)`` online and ``1 - 2^-K`` offline, on average. Since
    the target's coins play no part, canaries left out for this do not bias an audit.

    >>> usable([[True, True, False], [True, False, False]])
    array([False,  True, False])
    >>> usable([[True, True, False], [True, False, False]], online=False)
    array([False,  True,  True])
    """
    member = np.asarray(inside, dtype=bool)
    without = (~member).sum(axis=0) >= least
    return without & (member.sum(axis=0) >= least) if online else without


def refuse_none(judged: np.ndarray, references: int, attack: str, least: int = 1) -> None:
    """Raise ConfigError if no canary can be judged, with the number of references that suffices."""
    if judged.any():
        return
    one, sides = ("one" if least == 1 else str(least)), "without it"
    if attack != "offline":
        sides = f"with it and {one} without"
    raise ConfigError(
        f"{references} reference runs judge none of the {judged.size} canaries: the {attack} "
        f"attack needs for a canary at least {one} {sides}; give audit.reference_models = 8 of "
        "other seeds, so that fair coins leave out fewer than 1 % (4: 13 %, 2: half)"
    )


def checked(
    target: ArrayLike, references: ArrayLike, inside: ArrayLike, what: str = "scores"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return target (m,), references (K, m) as float64 and inside (K, m) as bool.

    Raises:
        DataError: shapes do not fit, no canary or reference, values are not finite.
    """
    x = finite(target, f"the target's {what}")
    known = finite(references, f"the references' {what}")
    member = np.asarray(inside)
    if x.ndim != 1 or known.shape[1:] != x.shape or member.shape != known.shape or not known.size:
        raise DataError(
            f"membership inference needs (m,) {what} of the target, (K, m) of K >= 1 references "
            f"and (K, m) coins, not {x.shape}, {known.shape} and {member.shape}"
        )
    if member.dtype != bool:
        raise DataError(f"coins of references must be true or false, not {member.dtype}")
    return x, known, member


def finite(values: ArrayLike, what: str) -> np.ndarray:
    """Return ``values`` as float64 of any shape; DataError where one is NaN or infinite."""
    array = np.asarray(values, dtype=np.float64)
    bad = np.argwhere(~np.isfinite(array))
    if bad.size:
        raise DataError(
            f"{what} hold {array[tuple(bad[0])]} at {tuple(int(i) for i in bad[0])} ({len(bad)} of "
            f"{array.size} are not finite); compute them from logits in float64, and look at "
            "whether the model diverged"
        )
    return array


class _Side:
    """The references of one side of each canary: their median, and how they scatter."""

    def __init__(self, known: np.ndarray, member: np.ndarray) -> None:
        counts = member.sum(axis=0)
        values = np.where(member, known, np.nan)
        some, several = counts > 0, counts > 1
        self.centre = np.full(counts.shape, np.nan)
        self.centre[some] = np.nanmedian(values[:, some], axis=0)
        self.own = np.full(counts.shape, np.nan)
        self.own[several] = np.nanvar(values[:, several], axis=0, ddof=1)
        self.freedom = int((counts[several] - 1).sum())
        total = float((self.own[several] * (counts[several] - 1)).sum())
        # Equal values may differ from their mean in the last digits.
        if total <= (ROUNDING * np.abs(known).max()) ** 2 * self.freedom:
            total = 0.0
        self.common = total / self.freedom if self.freedom else float("nan")


def _spread(side: _Side, other: _Side | None, fixed: bool) -> np.ndarray:
    """Return the standard deviation of each canary on a side."""
    common = side.common
    if other is not None and not common > 0:
        common = other.common if other.common > 0 else common
    if np.isnan(common):
        # No canary has two runs of a side: the unit is then free, and orders nothing otherwise.
        common = 1.0
    if common == 0:
        raise DataError(
            "all reference runs score every canary alike, so they are one and the same model; "
            "give runs of other seeds"
        )
    if fixed:
        return np.full(side.centre.shape, np.sqrt(common))
    return np.maximum(np.sqrt(side.own), FLOOR * np.sqrt(common))


def _log_normal(x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Return the log density up to the constant that both sides share."""
    return -np.log(std) - ((x - mean) / std) ** 2 / 2
