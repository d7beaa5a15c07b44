import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fedkd.errors import ConfigError, DataError
from fedkd.privacy.accounting import gaussian_epsilon
from fedkd.privacy.auditing import clopper_pearson as cp
from fedkd.privacy.auditing import fdp, one_run
from fedkd.privacy.auditing.bound import Bound, geometric, per_copy
from fedkd.privacy.auditing.bounds import all_bounds
from fedkd.privacy.auditing.gdp import gdp
from fedkd.privacy.auditing.one_shot import epsilon_two_gaussians, one_shot
from fedkd.privacy.auditing.roc import roc
from fedkd.rng import Rng

METHODS: list[Callable[..., Bound]] = [
    cp.clopper_pearson,
    gdp,
    one_run.one_run,
    fdp.one_run_fdp,
]
QUANTILES = stats.norm.ppf((np.arange(10_000) + 0.5) / 10_000)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda f: f.__name__)


def toss(rng: Rng, m: int, mu: float) -> tuple[np.ndarray, np.ndarray]:
    """Return scores of a Gaussian mechanism: canaries in by fair coins shift by mu."""
    generator = rng.numpy()
    coins = generator.random(m) < 0.5
    found = generator.normal(size=m) + mu * coins
    return found[coins], found[~coins]


# Vectors of the published implementations.


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((100, 100, 90, 1.0, 0.0), 2.73581e-5),
        ((1000, 100, 95, 2.0, 1e-5), 0.0178246),
        ((1000, 1000, 600, 0.0, 1e-5), 1.51515e-4),
    ],
)
def test_p_value_of_one_run(arguments: tuple[Any, ...], expected: float) -> None:
    assert one_run.p_value(*arguments) == pytest.approx(expected, rel=3e-6)


@pytest.mark.parametrize(
    "m, r, v, expected",
    [
        (1000, 100, 100, 3.46538),
        (1000, 100, 95, 2.16518),
        (1000, 1000, 600, 0.29723),
        (100, 20, 20, 1.81960),
        (5000, 500, 500, 4.97776),
        (1000, 1000, 500, 0),
    ],
)
def test_lower_bound_of_one_run(m: int, r: int, v: int, expected: float) -> None:
    assert one_run.lower_bound(m, r, v, 0.05, 1e-5) == pytest.approx(expected, abs=5.1e-6)


@pytest.mark.parametrize(
    "shift, plain, curve",
    [(0, 0, 0), (1, 1.13346, 2.164749), (2, 2.311945, 4.7218075), (4, 4.395568, 9.133752)],
)
def test_one_run_on_quantiles_of_normals(shift: float, plain: float, curve: float) -> None:
    # The published numbers search, and correct for, the corners of the convex hull of the ROC,
    # with guesses "in" only. Corners follow from the coins, so that our own search is another.
    corners = roc(QUANTILES + shift, QUANTILES).hull()
    tried = [(round(x), 0) for x in 10_000 * (corners.fpr + corners.tpr)]
    arguments: Any = {"confidence": 0.95, "delta": 1e-6, "tried": tried}
    found = one_run.one_run(QUANTILES + shift, QUANTILES, **arguments).epsilon
    assert found == pytest.approx(plain, abs=1e-6)
    # The published search ends within 1e-6 of epsilon.
    found = fdp.one_run_fdp(QUANTILES + shift, QUANTILES, **arguments).epsilon
    assert found == pytest.approx(curve, abs=1.5e-6)


@pytest.mark.parametrize("shift, true", [(1, 4.8866), (2, 10.9972), (4, 26.357)])
def test_search_without_coins_certifies_more_than_corners(shift: int, true: float) -> None:
    assert gaussian_epsilon(shift, 1e-6) == pytest.approx(true, abs=6e-5)
    published = {1: (1.13346, 2.164749), 2: (2.311945, 4.7218075), 4: (4.395568, 9.133752)}
    for method, corners in zip((one_run.one_run, fdp.one_run_fdp), published[shift], strict=True):
        found = method(QUANTILES + shift, QUANTILES, confidence=0.95, delta=1e-6)
        assert corners < found.epsilon < min(true, found.ceiling)


def test_clopper_pearson_vectors() -> None:
    found = float(cp.epsilon(500, 500, 0, 500, 0.01))
    assert found == pytest.approx(4.541915810224092, rel=1e-13)
    assert float(cp.lower(500, 500, 0.005)) == pytest.approx(0.9894593118113243, rel=1e-13)
    one = Bound(found, found, "clopper-pearson", 0.99, 0.0, 1000, "")
    assert per_copy(one, 2).epsilon == pytest.approx(2.27095790511, abs=1e-11)


@pytest.mark.parametrize(
    "n, expected",
    [(20, 1.597), (50, 2.570), (100, 3.281), (500, 4.906), (1000, 5.601), (10_000, 7.905)],
)
def test_ceilings_of_clopper_pearson(n: int, expected: float) -> None:
    assert cp.ceiling(n, n, 0.05) == pytest.approx(expected, abs=5.1e-4)


def test_one_shot_vector() -> None:
    assert epsilon_two_gaussians(0, 1, 1, 1, 1e-5) == pytest.approx(4.3772, abs=5e-5)
    assert epsilon_two_gaussians(3, 2, 1, 2, 1e-5) == pytest.approx(4.3772, abs=5e-5)


# What holds for each bound.


@every_method
@pytest.mark.parametrize("inside, outside", [(40, 40), (30, 70), (512, 488)])
def test_perfect_attack_reaches_the_ceiling(method: Any, inside: int, outside: int) -> None:
    above, below = 10.0 + np.arange(inside), -np.arange(outside)
    found = method(above, below, confidence=0.95, delta=1e-6)
    assert found.epsilon == pytest.approx(found.ceiling, rel=1e-9) and found.epsilon > 0
    above[:3] = -1e6
    weaker = method(above, below, confidence=0.95, delta=1e-6)
    assert weaker.epsilon < found.epsilon and weaker.ceiling == found.ceiling


@every_method
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_order_of_canaries_does_not_count(method: Any, level: float) -> None:
    inside, outside = toss(Rng(3), 301, 2.0)
    if level:
        inside, outside = np.round(inside), np.round(outside)
    generator = Rng(4).numpy()
    shuffled = generator.permutation(inside), generator.permutation(outside)
    first, second = (
        method(a, b, confidence=0.95, delta=1e-5) for a, b in ((inside, outside), shuffled)
    )
    assert first == second and first.n == 301 and first.epsilon > 0


@every_method
def test_ties_alone_certify_nothing(method: Any) -> None:
    found = method(np.ones(600), np.ones(400), confidence=0.95, delta=1e-5)
    assert found.epsilon == 0 < found.ceiling


@every_method
def test_perfect_attack_with_two_scores_is_seen(method: Any) -> None:
    found = method(np.ones(510), np.zeros(490), confidence=0.95, delta=1e-7)
    assert found.epsilon > 0.8 * found.ceiling


@every_method
def test_only_ranks_count(method: Any) -> None:
    inside, outside = toss(Rng(5), 200, 3.0)
    first = method(inside, outside, confidence=0.95, delta=1e-5)
    inside[inside.argmax()] = np.inf
    assert method(np.exp(inside), np.exp(outside), confidence=0.95, delta=1e-5) == first


@every_method
@pytest.mark.parametrize("mu", [0.0, 1.0, 3.0])
def test_bounds_exceed_the_truth_no_more_often_than_they_may(method: Any, mu: float) -> None:
    # 300 runs at confidence 0.8, so that 60 may; a valid bound stays below 83 but for 1 in 1,000.
    true = gaussian_epsilon(mu, 1e-4)
    found = [
        method(*toss(Rng(0).child("validity", run), 240, mu), confidence=0.8, delta=1e-4).epsilon
        for run in range(300)
    ]
    assert sum(value > true + 1e-9 for value in found) <= stats.binom.ppf(0.999, 300, 0.2)
    assert (np.median(found) == 0) if mu == 0 else (np.median(found) > 0.2 * mu)


def test_clopper_pearson_looks_in_both_directions() -> None:
    inside, outside = np.ones(200), np.repeat([0.0, 1.0], [160, 40])
    found = cp.clopper_pearson(inside, outside)
    assert found.epsilon == cp.clopper_pearson(-outside, -inside).epsilon
    assert found.epsilon > math.log(5)  # all that TPR = 1 at FPR = 1 / 5 could show


def test_ranks_of_thresholds_are_accounted_for_exactly() -> None:
    # The share of runs whose FPR lies above its limit is the significance, not just at most it.
    outside = np.sort(Rng(6).numpy().random((4000, 60)), axis=1)
    for j in geometric(60):
        fpr = 1 - outside[:, 60 - j]
        limit = cp.upper(j - 1, 60, 0.05)
        assert np.mean(fpr > limit) == pytest.approx(0.05, abs=0.015)
    _, false = cp.thresholds(outside[0], outside[0])
    assert (false == np.array(geometric(60)) - 1).all()


def test_number_of_guesses_does_not_follow_from_coins() -> None:
    generator = Rng(7).numpy()
    pooled = np.round(generator.normal(size=300), 1)
    found = []
    for share in (0.3, 0.5, 0.7):
        coins = generator.random(300) < share
        halves = np.sort(pooled[coins]), np.sort(pooled[~coins])
        found.append([r for r, _ in one_run.counts(*halves, one_run.guesses(300))])
    assert found[0] == found[1] == found[2]


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.lists(st.integers(0, 4), min_size=1, max_size=12),
    st.data(),
)
def test_counts_by_hand(inside: list[int], outside: list[int], data: Any) -> None:
    m = len(inside) + len(outside)
    top = data.draw(st.integers(0, m))
    bottom = data.draw(st.integers(0, m - top))
    ((r, v),) = one_run.counts(
        np.sort(np.array(inside, float)), np.sort(np.array(outside, float)), [(top, bottom)]
    )
    pooled = sorted(inside + outside)
    ends = [0] + [i for i in range(1, m) if pooled[i] != pooled[i - 1]] + [m]
    high = min(ends, key=lambda end: (abs(end - (m - top)), -end))
    low = min(min(ends, key=lambda end: (abs(end - bottom), end)), high)
    guessed_in, guessed_out = set(pooled[high:]), set(pooled[:low])
    assert not guessed_in & guessed_out
    assert r == m - high + low
    assert v == sum(x in guessed_in for x in inside) + sum(x in guessed_out for x in outside)


def test_more_confidence_certifies_less() -> None:
    inside, outside = toss(Rng(8), 500, 2.0)
    strict, loose = (all_bounds(inside, outside, confidence=c, delta=1e-5) for c in (0.99, 0.9))
    for low, high in zip(strict, loose, strict=True):
        assert low.epsilon < high.epsilon and low.ceiling < high.ceiling


def test_all_bounds_leave_out_what_needs_delta() -> None:
    inside, outside = toss(Rng(9), 100, 2.0)
    methods = [b.method for b in all_bounds(inside, outside, confidence=0.95, delta=1e-5)]
    assert methods == ["one-run", "clopper-pearson", "one-run-fdp", "gdp"]
    assert len(all_bounds(inside, outside, confidence=0.95, delta=0.0)) == 2


@every_method
def test_few_canaries_certify_nothing_and_say_so(method: Any) -> None:
    found = method([9.0, 8, 7, 6], [1.0, 2, 3, 4, 5], confidence=0.95, delta=1e-5)
    assert found.epsilon == found.ceiling == 0 and "too few" in found.assumes
    assert "of at most 0 with 9 canaries" in str(found)


# Refusals.


@every_method
def test_bad_scores_are_refused(method: Any) -> None:
    with pytest.raises(DataError, match="at least one canary that was planted"):
        method([], [1.0], confidence=0.95, delta=1e-5)
    with pytest.raises(DataError, match="1 of 2 scores of canaries outside are NaN"):
        method([1.0], [1.0, math.nan], confidence=0.95, delta=1e-5)
    with pytest.raises(ConfigError, match="confidence = 95"):
        method([1.0], [1.0], confidence=95, delta=1e-5)
    with pytest.raises(ConfigError, match="delta = 1"):
        method([1.0], [1.0], confidence=0.95, delta=1)


@pytest.mark.parametrize("method", [gdp, fdp.one_run_fdp])
def test_no_gaussian_epsilon_without_delta(method: Any) -> None:
    with pytest.raises(ConfigError, match="no Gaussian mechanism has an epsilon at 0"):
        method([1.0], [1.0], confidence=0.95, delta=0.0)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="5 right of 4"):
        one_run.lower_bound(10, 4, 5, 0.05, 0.0)
    with pytest.raises(ConfigError, match="5 right of 4"):
        fdp.lower_bound(10, 4, 5, 0.05)
    with pytest.raises(ConfigError, match="must be 0 to 2 in all"):
        one_run.one_run([1.0], [0.0], confidence=0.95, delta=0.0, tried=[(2, 1)])


# Groups.


def test_group_privacy_shrinks_delta() -> None:
    # k copies of a record under mu-GDP are k mu-GDP, so that the truth is known on both sides.
    for mu, copies in ((1.0, 4), (0.5, 8)):
        group = gaussian_epsilon(mu * copies, 1e-6)
        one = per_copy(Bound(group, 50.0, "one-run", 0.95, 1e-6, 100, "coins"), copies)
        assert one.epsilon == group / copies and one.ceiling == 50 / copies
        assert one.epsilon <= gaussian_epsilon(mu, one.delta)
        assert one.epsilon > gaussian_epsilon(mu, 1e-6)  # at the old delta it would be too high
        expected = 1e-6 * math.expm1(one.epsilon) / math.expm1(group)
        assert one.delta == pytest.approx(expected, rel=1e-12)


def test_group_of_one_or_of_nothing_certified() -> None:
    some = Bound(3.0, 4.0, "one-run", 0.95, 1e-5, 100, "coins")
    assert per_copy(some, 1) == some
    none = Bound(0.0, 4.0, "one-run", 0.95, 1e-5, 100, "coins")
    assert per_copy(none, 4) == Bound(0.0, 1.0, "one-run", 0.95, 2.5e-6, 100, "coins")
    large = Bound(2000.0, 4000.0, "gdp", 0.95, 1e-5, 100, "curve")
    assert per_copy(large, 2).delta == 0.0
    with pytest.raises(ConfigError, match="copies = 0"):
        per_copy(some, 0)


# One-shot.


def test_one_shot_finds_the_epsilon_of_a_gaussian_mechanism() -> None:
    # Each direction leaves mu / sqrt(d) in the cosine; noise and the others make it N(., 1 / d).
    dimension, mu, true = 10_000, 2.0, gaussian_epsilon(2.0, 1e-5)
    mean = {}
    for directions, runs in ((100, 200), (5000, 20)):
        estimates, wrong = [], 0
        for run in range(runs):
            noise = Rng(10).child(run).numpy().normal(size=directions)
            found = one_shot((mu + noise) / 100, dimension, 1e-5, 0.8)
            estimates.append(found["estimate"].epsilon)
            wrong += found["lower"].epsilon > true
            assert 0 < found["lower"].epsilon < found["lower"].ceiling
        mean[directions] = np.mean(estimates)
        assert wrong <= stats.binom.ppf(0.999, runs, 0.2)
    assert mean[5000] == pytest.approx(true, rel=0.05)
    assert true < mean[100] < 1.3 * true  # the spread of few cosines is not known well


def test_one_shot_without_memory() -> None:
    found = one_shot(Rng(11).numpy().normal(size=400) / 200, 40_000, 1e-5, 0.95)
    assert found["lower"].epsilon == 0 and found["estimate"].epsilon < 1.5
    assert "not a certified bound" in found["estimate"].assumes
    # A delta that allows all there is leaves nothing, however improbable the cosines were.
    sure = np.linspace(0.97, 0.99, 20)
    assert (
        one_shot(sure, 10**6, 0.99)["lower"].epsilon
        == 0
        < one_shot(sure, 10**6, 0.1)["lower"].epsilon
    )
    few = one_shot([0.5, 0.6, 0.7], 40_000, 1e-5)
    assert few["lower"].epsilon == 0 and "too few" in few["lower"].assumes


@pytest.mark.parametrize(
    "cosines, dimension, message",
    [
        ([0.1, 0.2], 999, "999 weights are exchanged"),
        ([0.1], 2000, "at least 2 cosines"),
        ([0.1, math.nan], 2000, "at least 2 cosines"),
        ([0.1, 1.5], 2000, "between -1 and 1"),
        ([0.1, 0.1], 2000, "all cosines are equal"),
    ],
)
def test_one_shot_refuses(cosines: list[float], dimension: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        one_shot(cosines, dimension, 1e-5)


def test_two_gaussians_refuse_no_spread() -> None:
    with pytest.raises(ConfigError, match="deviations above 0"):
        epsilon_two_gaussians(0, 0, 1, 1, 1e-5)
