"""Exposure against the reference implementation's vectors, brute force, closed forms, chance."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.special import log_ndtr

from fedkd.metrics.intervals import clopper_pearson
from fedkd.privacy.exposure import (
    NULL_BITS,
    bound,
    exact,
    exposure,
    extrapolated,
    interpolated,
    mean,
    rank,
    reduction,
)
from fedkd.privacy.exposure_fit import SkewNormal
from fedkd.rng import Rng

# Few values, so that ties are common; and any others.
LOSSES = st.one_of(
    st.integers(0, 6).map(float), st.floats(-50, 50, allow_subnormal=False, width=32)
)


def test_the_vectors_of_the_reference_implementation():
    found = interpolated([0, 0.1, 20.0, 3.5, 3.5], range(1, 17)).bits
    assert found[:2].tolist() == [4.0, 4.0] and found[3:].tolist() == [2.0, 2.0]
    assert found[2] == pytest.approx(-0.087463, abs=5e-7)


@pytest.mark.parametrize("seed", [0, 1])
def test_extrapolation_is_minus_log2_of_the_refit(seed):
    draws = Rng(seed).numpy()
    references = stats.skewnorm.rvs(4, 0, 1, size=10_000, random_state=draws)
    secrets = stats.skewnorm.rvs(4, 0, 1, size=10, random_state=draws)
    found = extrapolated(secrets, references)
    refit = stats.skewnorm.fit(references)
    assert found.method == "extrapolation" and found.fit > 0.01
    np.testing.assert_allclose(found.bits, -np.log2(stats.skewnorm.cdf(secrets, *refit)), atol=1e-7)
    assert found.fit == pytest.approx(stats.kstest(references, stats.skewnorm(*refit).cdf).pvalue)
    # Where the distribution function underflows: finite without a cap, and at most the cap.
    deep = SkewNormal(*map(float, refit)).log_cdf([-4.0, -20.0])
    assert np.isfinite(deep).all() and -deep[1] > -deep[0] > 100
    assert stats.skewnorm.cdf(-20.0, *refit) == 0
    assert extrapolated([-20.0], references, 10**9).bits.tolist() == [math.log2(10**9)]


def test_the_logarithm_of_the_distribution_function_has_closed_forms():
    z = np.linspace(-300, 9, 2000)
    # The location scales out; shape 1 is the larger of two normal numbers, -1 the smaller.
    np.testing.assert_allclose(
        SkewNormal(0.0, 5.0, 2.0).log_cdf(5 + 2 * z), log_ndtr(z), 1e-9, 1e-15
    )
    np.testing.assert_allclose(SkewNormal(1.0, 0.0, 1.0).log_cdf(z), 2 * log_ndtr(z), 1e-9, 1e-15)
    low = z[z < 5]
    smaller = log_ndtr(low) + np.log1p(np.exp(log_ndtr(-low)))
    np.testing.assert_allclose(SkewNormal(-1.0, 0.0, 1.0).log_cdf(low), smaller, 1e-9, 1e-15)


@pytest.mark.parametrize("shape", [0.3, 4.0, 40.0, 100.0, -4.0, -100.0])
def test_the_tail_joins_the_rest_and_the_density_is_its_slope(shape):
    fitted = SkewNormal(shape, 0.0, 1.0)
    z = np.linspace(-3, 2, 4001)
    log_cdf = fitted.log_cdf(z)
    assert (np.diff(log_cdf) > -1e-15).all()
    step = 1e-6
    slope = (fitted.log_cdf(z + step) - fitted.log_cdf(z - step)) / (2 * step)
    expected = np.exp(stats.norm.logpdf(z) + math.log(2) + log_ndtr(shape * z) - log_cdf)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-9)


@given(st.lists(LOSSES, min_size=1, max_size=12), st.lists(LOSSES, min_size=1, max_size=40))
def test_ranks_by_brute_force(canaries, references):
    ranks = [1 + sum(1 for other in references if other <= own) for own in canaries]
    assert rank(canaries, references).tolist() == ranks
    found = interpolated(canaries, references)
    np.testing.assert_allclose(found.bits, [math.log2(len(references) / r) for r in ranks])
    assert found.saturated.tolist() == [r == 1 for r in ranks]


@given(st.lists(LOSSES, min_size=2, max_size=40), st.data())
def test_exact_ranks_by_brute_force(space, data):
    size = len(space)
    one = data.draw(st.integers(0, size - 1))
    counted = sum(1 for other in space if other <= space[one])
    assert exact([space[one]], space).bits[0] == pytest.approx(math.log2(size / counted))
    # Several canaries: each against all secrets that are no canary.
    taken = data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=size - 1))
    others = [loss for i, loss in enumerate(space) if i not in taken]
    expected = [
        math.log2((len(others) + 1) / (1 + sum(1 for other in others if other <= space[i])))
        for i in sorted(taken)
    ]
    found = exact([space[i] for i in sorted(taken)], space)
    np.testing.assert_allclose(found.bits, expected, atol=1e-12)


@pytest.mark.parametrize("estimator", ["exact", "interpolation", "extrapolation"])
def test_a_model_that_memorised_nothing_shows_the_null_level(estimator):
    losses = Rng(7).child(estimator).numpy().normal(20, 3, size=1400)
    space = 1400.0 if estimator == "exact" else math.inf
    references = losses if estimator == "exact" else losses[400:]
    found = exposure(losses[:400], references, space, estimator)
    assert found.method == estimator
    interval = mean(found.bits, Rng(0))
    assert interval.low < NULL_BITS < interval.high and interval.high - interval.low < 0.4
    assert interval.low > 0.5  # zero is not the level of nothing


def test_the_intervals_cover_the_truth():
    """400 runs of 40 canaries: nominal 95 %; a bootstrap of so few skewed values keeps about 92 %.

    Three standard deviations of chance are 4 points, so 88 to 99 % is what is asked.
    """
    draws = Rng(11).numpy()
    null = -np.log2(draws.random((400, 40)))
    teacher = 6 + draws.normal(0, 3, size=(400, 40))
    student = 0.4 * teacher - np.log2(draws.random((400, 40)))
    truth = 0.4 * 6 + NULL_BITS
    covered = np.zeros(3)
    for i in range(400):
        level = mean(null[i], Rng(i))
        raw, beyond = reduction(teacher[i], student[i], Rng(i))
        covered += [
            level.low <= NULL_BITS <= level.high,
            raw.low <= 1 - truth / 6 <= raw.high,
            beyond.low <= (6 - truth) / (6 - NULL_BITS) <= beyond.high,
        ]
    assert (covered / 400 > 0.88).all() and (covered / 400 < 0.99).all()


def tail(bits, t):
    """The share of canaries with at least t bits, surely below the truth (one-sided 99.99 %)."""
    return clopper_pearson(int((bits >= t).sum()), len(bits), 0.9998).low


def gaussian_exposures(sigma, copies, trials=3000, size=512):
    """One-hot sums with noise: each coordinate is a candidate, its score minus what is released."""
    draws = Rng(13).child(copies).numpy()
    noise = draws.normal(0, sigma, size=(trials, size))
    noise[:, 0] += copies
    return np.array([exact([-row[0]], -row).bits[0] for row in noise])


def gaussian_delta(epsilon, sigma):
    """The exact delta of the Gaussian mechanism of sensitivity 1 (Balle and Wang, ICML 2018)."""
    a, b = 0.5 / sigma, epsilon * sigma
    return stats.norm.cdf(a - b) - math.exp(epsilon) * stats.norm.cdf(-a - b)


@pytest.mark.parametrize("copies", [1, 3])
def test_a_gaussian_mechanism_keeps_to_the_bound(copies):
    sigma = 1.0 if copies == 1 else 2.0
    bits = gaussian_exposures(sigma, copies)
    levels = np.arange(0, 9.1, 0.5)
    shares = np.array([tail(bits, t) for t in levels])
    for epsilon in (0.5, 1.0, 2.0, 4.0):
        allowed = bound(levels, epsilon, gaussian_delta(epsilon, sigma), copies)
        assert (shares <= allowed).all()
    # The test has power: less epsilon with the delta of more is caught.
    assert (shares > bound(levels, 0.1, gaussian_delta(4.0, sigma), copies)).any()


@pytest.mark.parametrize("epsilon", [1.0, 4.0])
def test_randomised_response_comes_close_to_the_bound_and_stays_below(epsilon):
    size, trials = 256, 20_000
    kept = math.exp(epsilon) / (math.exp(epsilon) + size - 1)
    draws = Rng(17).numpy()
    others = draws.integers(1, size, size=trials)
    said = np.where(draws.random(trials) < kept, 0, others)
    # The answer scores 0, all other candidates tie at 1; the secret is candidate 0.
    scores = np.append(0.0, np.ones(size - 1))
    right, wrong = (exact([score], scores).bits[0] for score in (0.0, 1.0))
    assert (right, wrong) == (8.0, 0.0)
    bits = np.where(said == 0, right, wrong)
    for t in (0.5, 4.0, 8.0):
        assert tail(bits, t) <= bound([t], epsilon, 0.0)[0]
    allowed = bound([8.0], epsilon, 0.0)[0]
    assert kept <= allowed < 1.25 * kept
    assert tail(bits, 8.0) > bound([8.0], epsilon / 4, 0.0)[0]
