"""The paired bootstrap against a loop, against closed forms, and what its interval covers."""

import math

import numpy as np
import pytest

from fedkd.metrics.intervals import paired_t
from fedkd.metrics.paired import paired_bootstrap
from fedkd.rng import stream

CLIENTS = 20


def naive(a, b, seed, resamples):
    """One resample after another, as one would say it; NaN pairs left out."""
    generator = np.random.Generator(np.random.Philox(seed))
    seeds = []
    for i in range(len(a)):
        pairs = [a[i][k] - b[i][k] for k in range(len(a[i]))]
        seeds.append([d for d in pairs if not math.isnan(d)])
    means = []
    for _ in range(resamples):
        total = 0.0
        for _ in seeds:
            values = seeds[generator.integers(len(seeds))]
            drawn = [values[generator.integers(len(values))] for _ in values]
            total += sum(drawn) / len(drawn)
        means.append(total / len(seeds))
    means.sort()
    at = [round(0.025 * resamples), round(0.975 * resamples) - 1]
    return np.mean([np.mean(s) for s in seeds]), means[at[0]], means[at[1]]


def effects(generator, seeds, between):
    """Differences of one study: the seeds' effects have ``between`` / CLIENTS as variance."""
    return generator.normal(size=(seeds, 1)) * math.sqrt(between / CLIENTS) + generator.normal(
        size=(seeds, CLIENTS)
    )


@pytest.mark.parametrize("seeds", [2, 4, 7])
def test_the_fast_resampling_is_that_of_the_loop(seeds):
    generator = np.random.Generator(np.random.Philox(seeds))
    a, b = generator.normal(0.7, 0.2, (seeds, 9)), generator.normal(0.6, 0.2, (seeds, 9))
    a[0, 2] = b[1, 5] = b[1, 6] = np.nan
    fast = paired_bootstrap(a, b, stream(0, "fast"), resamples=20_000)
    value, low, high = naive(a.tolist(), b.tolist(), 3, 6_000)
    assert fast.value == pytest.approx(value, abs=1e-12)
    # The quantiles of 6 000 resamples have a standard error of about 1.5 % of the width.
    width = high - low
    assert fast.low == pytest.approx(low, abs=0.06 * width)
    assert fast.high == pytest.approx(high, abs=0.06 * width)


def test_the_spread_of_resampled_means_has_its_closed_form():
    """Var* = (v_between + mean v_within / K) / S, with variances that divide by the count.

    In the balanced normal case its mean over studies is
    ``((S - 1) / S (t + s / K) + (K - 1) / K s / K) / S``; the truth is ``(t + s / K) / S``.
    """
    seeds, between = 6, 3.0
    generator = np.random.Generator(np.random.Philox(5))
    widths, exact = [], []
    for study in range(150):
        d = effects(generator, seeds, between)
        found = paired_bootstrap(d, 0 * d, stream(study, "width"), resamples=800)
        widths.append(found.high - found.low)
        exact.append((d.mean(axis=1).var() + d.var(axis=1).mean() / CLIENTS) / seeds)
    # Sums over 6 seeds are nearly normal: the width is 2 * 1.96 standard deviations.
    from_width = (np.array(widths) / (2 * 1.96)) ** 2
    assert np.mean(from_width) == pytest.approx(np.mean(exact), rel=0.06)
    t, within = between / CLIENTS, 1 / CLIENTS
    expected = ((seeds - 1) / seeds * (t + within) + (CLIENTS - 1) / CLIENTS * within) / seeds
    assert np.mean(exact) == pytest.approx(expected, rel=0.12)


def test_two_seeds_of_one_client_have_every_resample_counted():
    # Means are the lower, the middle and the upper value with chances 1/4, 1/2, 1/4.
    d = np.array([[0.1], [0.3]])
    wide = paired_bootstrap(d, 0 * d, stream(0, "all"))
    assert (wide.low, wide.high) == pytest.approx((0.1, 0.3))
    narrow = paired_bootstrap(d, 0 * d, stream(0, "all"), confidence=0.4)
    assert (narrow.low, narrow.high) == pytest.approx((0.2, 0.2))


@pytest.mark.parametrize(
    ("between", "seeds", "stated"),
    [(1e4, 3, 0.72), (1e4, 5, 0.82), (1e4, 10, 0.90), (1, 3, 0.93), (1, 10, 0.97), (0, 3, 0.97)],
)
def test_the_interval_covers_what_its_docstring_states(between, seeds, stated):
    studies = 400
    generator = np.random.Generator(np.random.Philox(seeds))
    covered = student = 0
    for study in range(studies):
        d = effects(generator, seeds, between)
        found = paired_bootstrap(d, 0 * d, stream(study, "cover"), resamples=400)
        covered += found.low <= 0 <= found.high
        t = paired_t(d.mean(axis=1), np.zeros(seeds))
        student += t.low <= 0 <= t.high
    # Three standard errors of a share of 400 studies; the statement itself is rounded.
    error = 3 * math.sqrt(stated * (1 - stated) / studies) + 0.01
    assert covered / studies == pytest.approx(stated, abs=error)
    assert student / studies == pytest.approx(0.95, abs=0.035)
