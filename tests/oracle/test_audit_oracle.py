"""Bounds against definitions: linear programs, enumeration, integration and scikit-learn."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from fedkd.privacy.accounting import gaussian_delta, gaussian_epsilon
from fedkd.privacy.auditing import clopper_pearson as cp
from fedkd.privacy.auditing import fdp, one_run
from fedkd.privacy.auditing.one_shot import epsilon_two_gaussians
from fedkd.privacy.auditing.roc import auc, roc
from fedkd.rng import Rng


def most_likely(mu: float, m: int, r: int, v: int) -> float:
    """Return the largest P[v or more right] that mu-GDP allows, as a linear program.

    Unknown are the probabilities of 0 to r right guesses; the concave curve is held by tangents.
    """
    i = np.arange(r + 1)
    at = stats.norm.cdf(np.linspace(-6, 4, 300))
    z = stats.norm.ppf(at)
    curve = stats.norm.cdf(z + mu)
    slope = np.exp(-mu * z - mu * mu / 2)
    rows, limits = [], []
    for j in range(1, r + 1):
        right, wrong = np.where(i >= j, i, 0) / m, np.where(i >= j - 1, r - i, 0) / m
        rows += [right - s * wrong for s in slope]
        limits += list(curve - slope * at)
    found = optimize.linprog(
        -(i >= v).astype(float), np.array(rows), limits, np.ones((1, r + 1)), [1.0], method="highs"
    )
    assert found.status == 0
    return float(-found.fun)


@pytest.mark.parametrize(
    "mu, m, r, v", [(0.0, 8, 8, 7), (0.5, 20, 10, 9), (1.0, 12, 12, 10), (1.0, 40, 8, 8)]
)
def test_recursion_of_the_curve_is_the_linear_program(mu: float, m: int, r: int, v: int) -> None:
    most = most_likely(mu, m, r, v)
    assert 0 < most < 1
    assert fdp.rejects(mu, m, r, v, most * 1.02)
    assert not fdp.rejects(mu, m, r, v, most * 0.98)


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.0])
def test_curve_allows_what_a_gaussian_mechanism_does(mu: float) -> None:
    # Each guess, sign of a score N(+-mu / 2, 1), is right with probability Phi(mu / 2), by itself.
    for m, v in ((20, 15), (60, 50)):
        p = float(stats.binom.sf(v - 1, m, stats.norm.cdf(mu / 2)))
        assert not fdp.rejects(mu, m, m, v, p)
        assert fdp.rejects(0.0, m, m, v, min(3 * stats.binom.sf(v - 1, m, 0.5) * m, 0.9))


@pytest.mark.parametrize("epsilon, delta", [(0.5, 0.0), (1.0, 0.02), (0.0, 0.05)])
def test_p_value_covers_a_mechanism_that_spends_all(epsilon: float, delta: float) -> None:
    # Every coin is shown with probability delta, else by randomised response with epsilon. Right
    # guesses are then independent, with a probability known in closed form.
    m = r = 12
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    for v in range(r + 1):
        exact = sum(math.comb(r, k) * right**k * (1 - right) ** (r - k) for k in range(v, r + 1))
        found = one_run.p_value(m, r, v, epsilon, delta)
        assert found >= exact - 1e-12
        if delta == 0:
            assert found == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("m, r, v", [(50, 20, 17), (200, 200, 130), (30, 9, 9)])
def test_p_value_by_its_definition(m: int, r: int, v: int) -> None:
    for epsilon, delta in product((0.0, 0.7, 3.0), (1e-6, 1e-3, 0.1)):
        q = 1 / (1 + math.exp(-epsilon))
        mass = [stats.binom.pmf(k, r, q) for k in range(r + 1)]
        alpha = max(sum(mass[v - i : v]) / i for i in range(1, v + 1))
        expected = min(1.0, sum(mass[v:]) + 2 * m * delta * alpha)
        assert one_run.p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("p", [0.05, 1e-3])
def test_bounds_sit_at_their_p_value(p: float) -> None:
    found = one_run.lower_bound(400, 60, 52, p, 1e-5)
    assert one_run.p_value(400, 60, 52, found, 1e-5) == pytest.approx(p, rel=1e-6)
    mu = fdp.lower_bound(400, 60, 52, p)
    assert fdp.rejects(mu, 400, 60, 52, p) and not fdp.rejects(mu + 1e-6, 400, 60, 52, p)


def test_limits_are_those_of_scipy() -> None:
    for n, a in ((7, 0.05), (300, 1e-4)):
        k = np.arange(n)
        assert cp.upper(k, n, a) == pytest.approx(stats.beta.ppf(1 - a, k + 1, n - k), rel=1e-9)
        assert cp.upper(n, n, a) == 1 and cp.lower(0, n, a) == 0
        exact = stats.binomtest(n - 2, n).proportion_ci(1 - 2 * a)
        assert float(cp.lower(n - 2, n, a)) == pytest.approx(exact.low, rel=1e-9)


def test_threshold_formula_is_the_region_of_errors() -> None:
    # The largest epsilon for which TPR_low > e^epsilon FPR_high + delta.
    tpr = float(cp.lower(70, 100, 0.025))
    fpr = float(cp.upper(4, 120, 0.025))
    found = float(cp.epsilon(70, 100, 4, 120, 0.05, 0.1))
    assert tpr == pytest.approx(math.exp(found) * fpr + 0.1, rel=1e-12)


def hockey_stick(m1: float, s1: float, m0: float, s0: float, epsilon: float) -> float:
    x = np.linspace(min(m0, m1) - 12 * max(s0, s1), max(m0, m1) + 12 * max(s0, s1), 400_001)
    gap = stats.norm.pdf(x, m1, s1) - math.exp(epsilon) * stats.norm.pdf(x, m0, s0)
    return float(integrate.trapezoid(np.maximum(gap, 0), x))


@pytest.mark.parametrize(
    "m0, s0, m1, s1",
    [(0, 1, 1, 1.3), (0, 1, 2, 0.6), (0.0, 0.02, 0.05, 0.03), (1, 2, 0, 1.999), (0, 1, 0, 1.5)],
)
@pytest.mark.parametrize("delta", [1e-5, 0.02])
def test_two_gaussians_by_integration(
    m0: float, s0: float, m1: float, s1: float, delta: float
) -> None:
    found = epsilon_two_gaussians(m0, s0, m1, s1, delta)
    forth, back = hockey_stick(m1, s1, m0, s0, found), hockey_stick(m0, s0, m1, s1, found)
    assert max(forth, back) == pytest.approx(delta, rel=1e-3)
    assert epsilon_two_gaussians(m1, s1, m0, s0, delta) == pytest.approx(found, rel=1e-8)


def test_two_gaussians_meet_the_equal_case() -> None:
    for ratio in (1 - 1e-6, 1 + 1e-6):
        found = epsilon_two_gaussians(0, 1, 1.5, ratio, 1e-5)
        assert found == pytest.approx(gaussian_epsilon(1.5, 1e-5), rel=1e-4)
    assert gaussian_delta(1.5, epsilon_two_gaussians(0, 1, 1.5, 1, 1e-5)) == pytest.approx(1e-5)


def test_curve_and_area_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import roc_auc_score, roc_curve

    generator = Rng(2).numpy()
    for step in (0.0, 0.5):
        inside, outside = generator.normal(0.7, 1.0, 57), generator.normal(size=83)
        if step:
            inside, outside = np.round(inside / step), np.round(outside / step)
        labels = np.repeat([1, 0], [57, 83])
        fpr, tpr, _ = roc_curve(labels, np.r_[inside, outside], drop_intermediate=False)
        found = roc(inside, outside)
        assert found.fpr == pytest.approx(fpr) and found.tpr == pytest.approx(tpr)
        expected = roc_auc_score(labels, np.r_[inside, outside])
        assert auc(inside, outside).value == pytest.approx(expected)
        assert found.area() == pytest.approx(expected)


def test_variance_of_the_area_by_pairs() -> None:
    # DeLong's variance written over pairs, on the scale of the area itself.
    generator = Rng(3).numpy()
    inside, outside = generator.normal(1, 1, 20), generator.normal(size=30)
    wins = (inside[:, None] > outside[None]).astype(float)
    variance = np.var(wins.mean(1), ddof=1) / 20 + np.var(wins.mean(0), ddof=1) / 30
    found, area = auc(inside, outside), wins.mean()
    half = stats.norm.ppf(0.975) * math.sqrt(variance) / (area * (1 - area))
    logit = math.log(area / (1 - area))
    assert found.low == pytest.approx(1 / (1 + math.exp(half - logit)))
    assert found.high == pytest.approx(1 / (1 + math.exp(-half - logit)))
