"""What a sequence of Gaussian releases costs: epsilon, delta, and the noise that keeps to a target.

Opacus computes the Renyi curves and the privacy loss variables; this module keeps its answers valid
where it would crash, warn, go below zero or report a floor, and inverts them. Every number is an
upper bound: where a bound cannot be computed, a looser valid one or ``inf`` is reported.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import final

import numpy as np

from fedkd.errors import CheckpointError, ConfigError, unknown

Event = tuple[float, float, int]
"""(noise multiplier, sampling rate, steps)."""

ACCOUNTANTS = ("rdp", "prv")
"""The central-limit accountant (gdp) is not on offer: it reports less than what is spent."""

SMALL_ORDERS = tuple(range(2, 64))
LARGE_ORDERS = (72, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768, 1024)
"""Beyond those of Opacus: they lower its floor (0.103 at delta = 1e-5) to about 0.004."""

LARGEST_NOISE = 2.0**20
SMALLEST_NOISE = 2.0**-20
PRV_ERROR = 0.01
PRV_POINTS = 2**22
PRV_RANGE = 500.0


@final
class History:
    """How often which Gaussian mechanism was used, merged by (noise multiplier, sampling rate).

    The order of releases changes no bound, so alternating mechanisms stay two entries.

    >>> history = History([(1.0, 0.1, 2), (2.0, 1.0, 1)])
    >>> history.add(1.0, 0.1, 3)
    >>> history.events()
    [(1.0, 0.1, 5), (2.0, 1.0, 1)]
    """

    def __init__(self, events: Iterable[tuple[float, float, int]] = ()) -> None:
        self._steps: dict[tuple[float, float], int] = {}
        for noise_multiplier, sample_rate, steps in events:
            self.add(noise_multiplier, sample_rate, steps)

    def add(self, noise_multiplier: float, sample_rate: float, steps: int = 1) -> None:
        """Count ``steps`` releases with noise std = multiplier times sensitivity; inf is free.

        Raises:
            ConfigError: a negative or undefined multiplier, a rate outside [0, 1], negative steps.
        """
        z, q, n = float(noise_multiplier), float(sample_rate), operator.index(steps)
        if not z >= 0:
            raise ConfigError(f"noise multiplier = {z!r}: must be 0 (no privacy) or more")
        if not 0 <= q <= 1:
            raise ConfigError(f"sampling rate = {q!r}: must lie in [0, 1] (1: no amplification)")
        if n < 0:
            raise ConfigError(f"steps = {n}: must be 0 or more")
        if n:
            key = (z + 0.0, q + 0.0)
            self._steps[key] = self._steps.get(key, 0) + n

    def events(self) -> list[Event]:
        """Return (noise multiplier, sampling rate, steps) in ascending order."""
        return sorted((z, q, n) for (z, q), n in self._steps.items())

    def rows(self) -> np.ndarray:
        """Return the events as (R, 3) float64; the inverse of :meth:`from_rows`."""
        return np.array(self.events(), dtype=np.float64).reshape(-1, 3)

    @classmethod
    def from_rows(cls, rows: np.ndarray) -> History:
        """Make a history from (R, 3) rows.

        Raises:
            CheckpointError: another shape, or rows that no history has.
        """
        table = np.asarray(rows, dtype=np.float64)
        if table.ndim != 2 or table.shape[1] != 3 or not np.all(table[:, 2] == table[:, 2] // 1):
            raise CheckpointError(f"a privacy history has rows (noise, rate, steps), not {rows!r}")
        try:
            return cls((z, q, int(n)) for z, q, n in table.tolist())
        except (ConfigError, OverflowError) as error:
            raise CheckpointError(f"a privacy history cannot be read: {error}") from None

    def joined(self, other: History) -> History:
        """Return a new history with the events of both."""
        return History([*self.events(), *other.events()])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and self._steps == other._steps

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        return bool(self._steps)

    def __repr__(self) -> str:
        return f"History({self.events()})"


def epsilon(history: History, delta: float, accountant: str = "rdp") -> float:
    """Return an epsilon at which all releases of ``history`` together are (epsilon, delta)-DP.

    ``rdp``: min over orders a of R(a) + log(1 - 1/a) - log(delta a) / (a - 1), with R the sum of
    the Renyi curves (Balle et al., AISTATS 2020, Theorem 21). ``prv``: the upper bound of Gopi et
    al. (NeurIPS 2021), exact where nothing was sampled, never above ``rdp``. Rates below 1 mean
    Poisson sampling and add-remove or zero-out neighbours. Nothing spent gives 0, a release without
    noise inf; it is never negative.

    Raises:
        ConfigError: delta outside (0, 1), or an unknown accountant.
    """
    _check(delta, accountant)
    events = _charged(history)
    if not events:
        return 0.0
    if any(z == 0 for z, _, _ in events):
        return math.inf
    bound = _rdp_epsilon(events, delta)
    if accountant == "prv":
        bound = min(bound, _prv_epsilon(events, delta))
    return max(bound, 0.0)


def delta_of(history: History, epsilon: float, accountant: str = "rdp") -> float:
    """Return the smallest delta at which ``epsilon`` holds; 1 where none does.

    ``rdp`` is a closed form; ``prv`` bisects log(delta) to a relative 1 %, always on the safe side.

    Raises:
        ConfigError: a negative epsilon, or an unknown accountant.
    """
    _check(0.5, accountant)
    if not epsilon >= 0:
        raise ConfigError(f"epsilon = {epsilon!r}: must be 0 or more")
    events = _charged(history)
    if not events or epsilon == math.inf:
        return 0.0
    if any(z == 0 for z, _, _ in events):
        return 1.0
    if accountant == "prv" and _unsampled(events):
        return gaussian_delta(1 / events[0][0], epsilon)

    def log_delta(orders: np.ndarray, rdp: np.ndarray) -> np.ndarray:
        return (orders - 1) * (rdp - epsilon + np.log1p(-1 / orders)) - np.log(orders)

    found = min(math.exp(min(_best(events, log_delta), 0.0)), 1.0)
    if accountant == "rdp" or found < 1e-300:
        return found
    high = math.log(min(found, 1 - 1e-9))

    def holds(log_delta: float) -> bool:
        return _prv_epsilon(events, math.exp(log_delta)) <= epsilon

    low = high - math.log(1e4)
    if holds(low):
        return math.exp(low)
    return math.exp(_smallest(holds, low, high, lambda low, high: high - low < 0.01))


def joint(*multipliers: float) -> float:
    """Return the multiplier of one release that consists of several: (sum z^-2)^(-1/2).

    inf costs nothing, any 0 gives 0, no release gives inf.

    >>> round(joint(2.0, 2.0), 6), joint(1.0, float("inf")), joint(0.0, 5.0), joint()
    (1.414214, 1.0, 0.0, inf)
    """
    if not all(z >= 0 for z in multipliers):
        raise ConfigError(f"noise multipliers = {multipliers!r}: must be 0 or more")
    if any(z == 0 for z in multipliers):
        return 0.0
    cost = math.hypot(*(1 / z for z in multipliers))
    return 1 / cost if cost else math.inf


def effective(noise_multiplier: float, adjacency: str) -> float:
    """Return noise std over sensitivity, where the multiplier is noise std over clipping norm.

    add-remove, zero-out: a unit's contribution against none, sensitivity = norm. replace-one: one
    against another, twice the norm, so half the multiplier.

    >>> effective(2.0, "add-remove"), effective(2.0, "replace-one")
    (2.0, 1.0)
    """
    factors = {"add-remove": 1.0, "zero-out": 1.0, "replace-one": 0.5}
    if adjacency not in factors:
        raise unknown("adjacency", adjacency, factors)
    return noise_multiplier * factors[adjacency]


def calibrate(
    target: float,
    delta: float,
    history_at: Callable[[float], History],
    accountant: str = "rdp",
    tolerance: float = 0.01,
) -> float:
    """Return the smallest multiplier z with ``epsilon(history_at(z)) <= target``.

    Found by bisection until epsilon is within ``tolerance * min(1, target)`` below the target.
    ``history_at`` must spend less for larger z.

    Raises:
        ConfigError: the target is not positive, or no noise reaches it.
    """
    if not target > 0 or not tolerance > 0:
        raise ConfigError(f"epsilon = {target!r}, tolerance = {tolerance!r}: must be positive")

    def cost(z: float) -> float:
        return epsilon(history_at(z), delta, accountant)

    if cost(0.0) <= target:
        return 0.0
    floor = cost(LARGEST_NOISE)
    if floor > target:
        other = ' or take accountant = "prv"' if accountant == "rdp" else ""
        raise ConfigError(
            f"epsilon = {target:g} at delta = {delta:g} cannot be reached: with the noise "
            f"multiplier {LARGEST_NOISE:g} the {accountant} accountant still reports {floor:.3g} "
            "(its floor, or releases whose noise is fixed). Raise epsilon above that, raise delta, "
            f"plan fewer or noisier releases{other}"
        )
    high = 1.0
    while cost(high) > target:
        high *= 2
    low = high / 2
    while low > SMALLEST_NOISE and cost(low) <= target:
        low, high = low / 2, low
    if low <= SMALLEST_NOISE:
        return high
    slack = tolerance * min(1.0, target)

    def close(low: float, high: float) -> bool:
        return target - cost(high) <= slack or high - low <= 1e-9 * high

    return _smallest(lambda z: cost(z) <= target, low, high, close)


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the exact delta of a Gaussian mechanism with sensitivity over noise std = ``mu``.

    delta = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu)
    (Balle and Wang, ICML 2018, Theorem 8); T releases with mu have sqrt(T) mu.
    """
    from scipy.special import log_ndtr

    if not mu >= 0 or math.isnan(epsilon):
        raise ConfigError(f"mu = {mu!r}, epsilon = {epsilon!r}: mu must be 0 or more")
    if math.inf in (mu, epsilon):
        return float(mu == math.inf)
    shift = epsilon / mu if mu else math.copysign(math.inf, epsilon)
    if mu == 0 or math.isinf(shift):
        return max(0.0, -math.expm1(epsilon)) if epsilon < 0 else 0.0
    gain, loss = log_ndtr(mu / 2 - shift), epsilon + log_ndtr(-mu / 2 - shift)
    return float(max(math.exp(gain) - math.exp(min(loss, gain)), 0.0))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 with ``gaussian_delta(mu, epsilon) <= delta``."""
    _check(delta, "rdp")
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    # The bound for concentrated DP (Bun and Steinke, TCC 2016) lies above the exact value.
    high = mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta))
    if high == math.inf:
        return high
    return _smallest(
        lambda value: gaussian_delta(mu, value) <= delta,
        0.0,
        high,
        lambda low, high: high - low <= 1e-12 * high,
    )


def _check(delta: float, accountant: str) -> None:
    if accountant not in ACCOUNTANTS:
        raise unknown("accountant", accountant, ACCOUNTANTS)
    if not 0 < delta < 1:
        raise ConfigError(
            f"delta = {delta!r}: must lie between 0 and 1, far below 1 / units (such as 1e-5)"
        )


def _charged(history: History) -> tuple[Event, ...]:
    """Return the events that cost something; all unsampled ones are exactly one Gaussian."""
    events = [(z, q, n) for z, q, n in history.events() if q > 0 and z < math.inf]
    whole = joint(*(z / math.sqrt(n) for z, q, n in events if q == 1))
    sampled = [event for event in events if event[1] < 1]
    return tuple(sampled + ([(whole, 1.0, 1)] if whole < math.inf else []))


def _unsampled(events: Sequence[Event]) -> bool:
    return len(events) == 1 and events[0][1] == 1


def _smallest(
    holds: Callable[[float], bool],
    low: float,
    high: float,
    close: Callable[[float, float], bool],
) -> float:
    """Bisect for the smallest value that holds; ``high`` does and ``low`` does not."""
    while not close(low, high):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rdp_epsilon(events: Sequence[Event], delta: float) -> float:
    def bound(orders: np.ndarray, rdp: np.ndarray) -> np.ndarray:
        return rdp + np.log1p(-1 / orders) - (np.log(orders) + math.log(delta)) / (orders - 1)

    return _best(events, bound)


def _best(events: Sequence[Event], bound: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """Return the least bound over Renyi orders: integers, then tenths beside the best one.

    Any set of orders is valid. Opacus takes seconds for orders near 1 at rates near 1/2, so that
    fractional orders, and large ones, are asked for only where they can win.
    """

    def least(orders: tuple[float, ...]) -> tuple[float, float]:
        rdp = np.array([n * _curve(z, q, orders) for z, q, n in events]).sum(axis=0)
        values = bound(np.array(orders, dtype=np.float64), rdp)
        best = int(np.argmin(values))
        return float(values[best]), orders[best]

    found, order = least(SMALL_ORDERS)
    if order <= 11:
        tenths = tuple(round(order + tenth / 10, 1) for tenth in range(-9, 10) if tenth)
        return min(found, least(tenths)[0])
    return min(found, least(LARGE_ORDERS)[0]) if order == SMALL_ORDERS[-1] else found


@functools.lru_cache(maxsize=8192)
def _curve(noise_multiplier: float, sample_rate: float, orders: tuple[float, ...]) -> np.ndarray:
    """Return R(a) of one release at every order, (orders,)."""
    return np.array([_rdp(noise_multiplier, sample_rate, float(a)) for a in orders])


@functools.lru_cache(maxsize=65536)
def _rdp(noise_multiplier: float, sample_rate: float, order: float) -> float:
    """Return R(a) of one release; inf where it cannot be computed, which only drops the order."""
    from opacus.accountants.analysis.rdp import compute_rdp

    # More noise than this is accounted as this: squares would overflow, and less noise is safe.
    z = min(noise_multiplier, LARGEST_NOISE)
    try:
        value = float(compute_rdp(q=sample_rate, noise_multiplier=z, steps=1, orders=order))
    except (ArithmeticError, ValueError):
        return math.inf
    return math.inf if math.isnan(value) else max(value, 0.0)


@functools.lru_cache(maxsize=1024)
def _prv_epsilon(events: tuple[Event, ...], delta: float) -> float:
    """Return the upper bound by numerical composition; inf where it cannot be trusted.

    Domain and mesh follow Gopi et al., remark 5.6, with our Renyi bounds. A domain so wide or a
    delta so small that rounding would show is left to the Renyi accountant.
    """
    from opacus.accountants.analysis import prv

    if _unsampled(events):
        return gaussian_epsilon(1 / events[0][0], delta)
    error, steps = delta / 1000, [n for _, _, n in events]
    tails = [_rdp_epsilon([(z, q, 1)], error / (8 * sum(steps))) for z, q, _ in events]
    limit = max(_rdp_epsilon(events, error / 4), *tails, PRV_ERROR) + 3
    mesh = PRV_ERROR / math.sqrt(sum(steps) * math.log(12 / error) / 2)
    points = 2 * limit / mesh
    if limit > PRV_RANGE or points > min(PRV_POINTS, delta / 100 / np.finfo(np.float64).eps):
        return math.inf
    try:
        with np.errstate(all="ignore"):
            domain = prv.Domain.create_aligned(-limit, limit, mesh)
            losses = [prv.PoissonSubsampledGaussianPRV(q, z) for z, q, _ in events]
            cut = [
                prv.TruncatedPrivacyRandomVariable(x, domain.t_min, domain.t_max) for x in losses
            ]
            composed = prv.compose_heterogeneous([prv.discretize(x, domain) for x in cut], steps)
            upper = float(composed.compute_epsilon(delta, error, PRV_ERROR)[2])
    except (ArithmeticError, ValueError, RuntimeError):
        return math.inf
    return math.inf if math.isnan(upper) else upper
