import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedkd.metrics.accuracy import (
    absent_class_accuracy,
    per_class_accuracy,
    user_accuracy,
    weighted_accuracy,
)
from fedkd.metrics.fairness import jain, spread, std, worst_share
from fedkd.metrics.intervals import bootstrap_mean, clopper_pearson, mean_t, paired_t
from fedkd.metrics.selection import chosen_on_validation, last, mean_last
from fedkd.rng import Rng

NAN = float("nan")
accuracies = st.lists(st.integers(0, 100).map(lambda i: i / 100), min_size=1, max_size=30)
few = settings(max_examples=50, deadline=None, derandomize=True)


# ---- accuracy


def test_the_two_means_differ_under_quantity_skew_only():
    assert user_accuracy([0.2, 0.8]) == pytest.approx(0.5)
    assert weighted_accuracy([0.2, 0.8], [1, 3]) == pytest.approx(0.65)
    assert weighted_accuracy([0.2, 0.8], [5, 5]) == pytest.approx(0.5)


def test_weighted_accuracy_is_the_accuracy_of_all_examples():
    correct, total = np.array([3, 10, 0]), np.array([4, 30, 6])
    assert weighted_accuracy(correct / total, total) == pytest.approx(13 / 40)


def test_clients_without_examples_do_not_count():
    assert weighted_accuracy([0.5, NAN], [10, 0]) == 0.5
    with pytest.raises(ValueError, match="accuracies hold nan at position 1"):
        weighted_accuracy([0.5, NAN], [10, 1])


@pytest.mark.parametrize("counts", [[0, 0], [3, -1]])
def test_impossible_counts(counts):
    with pytest.raises(ValueError, match="counts"):
        weighted_accuracy([0.5, 0.5], counts)


def test_accuracy_by_class():
    got = per_class_accuracy([1, 0, 3], [2, 0, 3])
    np.testing.assert_array_equal(got, [0.5, NAN, 1.0])
    with pytest.raises(ValueError, match="class 1 has 3 correct of 2"):
        per_class_accuracy([0, 3], [1, 2])
    with pytest.raises(ValueError, match="paired, but there are 2 and 1"):
        per_class_accuracy([0, 3], [1])


def test_absent_classes_alone_are_counted():
    correct, total = [90, 2, 1, 50], [100, 10, 20, 50]
    assert absent_class_accuracy(correct, total, [0, 1, 1, 0]) == pytest.approx(3 / 30)
    assert absent_class_accuracy(correct, total, [1] * 4) == pytest.approx(143 / 180)
    assert math.isnan(absent_class_accuracy(correct, total, [0] * 4))
    assert math.isnan(absent_class_accuracy([1, 0], [1, 0], [False, True]))
    with pytest.raises(ValueError, match="mask of absent classes"):
        absent_class_accuracy(correct, total, [True])


# ---- fairness


@few
@given(accuracies, st.randoms(use_true_random=False))
def test_fairness_does_not_depend_on_the_order_of_clients(values, random):
    mixed = random.sample(values, len(values))
    for key, value in spread(values).items():
        assert spread(mixed)[key] == pytest.approx(value)


@few
@given(accuracies, st.floats(0.01, 1), st.floats(0.01, 100))
def test_fairness_under_shift_and_scale(values, shift, scale):
    array = np.array(values)
    assert std(array + shift) == pytest.approx(std(array), abs=1e-12)
    assert std(array * scale) == pytest.approx(scale * std(array), abs=1e-9)
    assert jain(array * scale) == pytest.approx(jain(array))
    assert 1 / len(values) - 1e-12 <= jain(array) <= 1 + 1e-12


@few
@given(accuracies)
def test_worst_share_lies_between_minimum_and_mean_and_grows(values):
    shares = [worst_share(values, share) for share in (1e-6, 0.1, 0.5, 1.0)]
    assert shares[0] == min(values)
    assert shares[-1] == pytest.approx(np.mean(values))
    assert all(a <= b + 1e-12 for a, b in pairwise(shares))


@pytest.mark.parametrize(
    ("n", "share", "count"), [(20, 0.1, 2), (21, 0.1, 3), (100, 0.07, 7), (3, 0.1, 1), (30, 0.1, 3)]
)
def test_worst_share_counts_by_ceiling(n, share, count):
    assert worst_share(range(n), share) == pytest.approx((count - 1) / 2)


def test_std_is_that_of_the_population():
    assert std([1, 3]) == 1.0
    assert std([0.7]) == 0.0


def test_jain_of_k_equal_winners_is_k_of_n():
    assert jain([2, 2, 2, 0, 0, 0, 0, 0]) == pytest.approx(3 / 8)
    assert jain([0.0]) == 1.0
    assert jain([1e-200, 1e-200]) == 1.0
    with pytest.raises(ValueError, match="at least 0"):
        jain([1, -1])


@pytest.mark.parametrize("share", [0, -0.1, 1.1, NAN])
def test_impossible_shares(share):
    with pytest.raises(ValueError, match="share"):
        worst_share([1, 2], share)


# ---- intervals


def test_student_t_equals_scipy():
    values = [0.81, 0.84, 0.78, 0.83, 0.90]
    got = mean_t(values, 0.9)
    low, high = stats.t.interval(0.9, 4, loc=np.mean(values), scale=stats.sem(values))
    assert (got.value, got.low, got.high) == pytest.approx((np.mean(values), low, high))
    assert (got.n, got.method) == (5, "Student t 90%")


def test_one_value_has_no_interval_and_equal_values_a_point():
    for one in (mean_t([0.3]), bootstrap_mean([0.3], Rng(0)), paired_t([1.0], [0.7])):
        assert math.isnan(one.low)
        assert math.isnan(one.high)
        assert one.n == 1
    for point in (mean_t([0.25] * 4), bootstrap_mean([0.25] * 4, Rng(0))):
        assert (point.value, point.low, point.high) == (0.25, 0.25, 0.25)


def test_pairing_removes_what_seeds_share():
    noise = Rng(0).numpy().normal(size=8)
    gain = 0.1 + 0.01 * Rng(1).numpy().normal(size=8)
    paired = paired_t(noise + gain, noise)
    assert paired.low > 0.08
    assert paired.high < 0.12
    oracle = stats.ttest_rel(noise + gain, noise).confidence_interval(0.95)
    assert (paired.low, paired.high) == pytest.approx((oracle.low, oracle.high))
    reverse = paired_t(noise, noise + gain)
    assert (reverse.low, reverse.high) == pytest.approx((-paired.high, -paired.low))
    with pytest.raises(ValueError, match="paired, but there are 8 and 7"):
        paired_t(noise, noise[1:])


def coverage(interval, draw, truth, trials):
    inside = 0
    for trial in range(trials):
        estimate = interval(draw(Rng(trial)), Rng(trial, ("resample",)))
        inside += estimate.low <= truth <= estimate.high
    return inside / trials


def test_student_t_covers_as_often_as_it_says():
    def draw(rng):
        return rng.numpy().normal(2.0, 3.0, size=3)

    covered = coverage(lambda values, _: mean_t(values), draw, 2.0, 1000)
    assert 0.93 < covered < 0.97


def test_bootstrap_covers_skewed_values():
    def draw(rng):
        return rng.numpy().beta(4, 1, size=30)

    covered = coverage(lambda v, rng: bootstrap_mean(v, rng, resamples=400), draw, 0.8, 300)
    assert 0.90 < covered < 0.98


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_equals_scipys_up_to_resampling(confidence):
    values = Rng(3).numpy().beta(5, 1, size=20)
    ours = bootstrap_mean(values, Rng(0), confidence, resamples=20_000)
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        confidence_level=confidence,
        n_resamples=20_000,
        method="BCa",
        rng=Rng(1).numpy(),
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    # The correction leans towards the long tail, which a symmetric interval does not.
    assert ours.value - ours.low > ours.high - ours.value


def test_bootstrap_is_addressed_and_invariant():
    values = Rng(7).numpy().random(12)
    first = bootstrap_mean(values, Rng(0))
    assert first == bootstrap_mean(values, Rng(0))
    assert first != bootstrap_mean(values, Rng(1))
    for scale in (1e-9, 1e9):
        moved = bootstrap_mean(values * scale, Rng(0))
        assert moved.low == pytest.approx(first.low * scale)
        assert moved.high == pytest.approx(first.high * scale)


@few
@given(accuracies.filter(lambda v: len(v) > 1), st.integers(0, 99))
def test_bootstrap_never_leaves_the_data(values, seed):
    estimate = bootstrap_mean(values, Rng(seed), resamples=100)
    low, high = min(values) - 1e-12, max(values) + 1e-12
    assert low <= estimate.low <= estimate.high <= high


def test_clopper_pearson_inverts_the_binomial_tails():
    estimate = clopper_pearson(7, 20)
    assert stats.binom.sf(6, 20, estimate.low) == pytest.approx(0.025)
    assert stats.binom.cdf(7, 20, estimate.high) == pytest.approx(0.025)
    theirs = stats.binomtest(7, 20).proportion_ci(method="exact")
    assert (estimate.low, estimate.high) == pytest.approx((theirs.low, theirs.high))


def test_clopper_pearson_at_the_edges():
    none, all_ = clopper_pearson(0, 10), clopper_pearson(10, 10)
    assert (none.low, all_.high) == (0.0, 1.0)
    assert none.high == pytest.approx(1 - 0.025**0.1)
    assert all_.low == pytest.approx(0.025**0.1)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9])
def test_clopper_pearson_covers_at_least_as_often_as_it_says(p):
    intervals = [clopper_pearson(k, 15) for k in range(16)]
    inside = [k for k in range(16) if intervals[k].low <= p <= intervals[k].high]
    assert stats.binom.pmf(inside, 15, p).sum() >= 0.95


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_trials(successes, n):
    with pytest.raises(ValueError, match="impossible"):
        clopper_pearson(successes, n)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_impossible_confidence(confidence):
    for call in (
        lambda: mean_t([1, 2], confidence),
        lambda: paired_t([1, 2], [1, 1], confidence),
        lambda: bootstrap_mean([1, 2], Rng(0), confidence),
        lambda: clopper_pearson(1, 2, confidence),
    ):
        with pytest.raises(ValueError, match="confidence"):
            call()


def test_no_resamples():
    with pytest.raises(ValueError, match="resamples"):
        bootstrap_mean([1, 2], Rng(0), resamples=0)


# ---- selection


def test_the_reported_round_never_looks_at_the_test_set():
    validation, test = [0.1, 0.9, 0.5, 0.9], [0.2, 0.3, 0.99, 0.4]
    assert chosen_on_validation(validation, test) == (1, 0.3)
    assert chosen_on_validation(validation, [0, 0.3, 0, 1]) == (1, 0.3)


def test_rounds_without_validation_are_never_chosen():
    assert chosen_on_validation([NAN, 0.2, NAN], [0.9, 0.1, 0.9]) == (1, 0.1)
    with pytest.raises(ValueError, match="NaN"):
        chosen_on_validation([NAN, NAN], [1, 2])
    with pytest.raises(ValueError, match="paired"):
        chosen_on_validation([1, 2], [1])


def test_last_rounds():
    values = [0.0, 0.2, 0.4, 0.6]
    assert last(values) == mean_last(values, 1) == 0.6
    assert mean_last(values, 2) == pytest.approx(0.5)
    assert mean_last(values, 99) == pytest.approx(0.3)
    assert math.isnan(mean_last([1.0, NAN], 2))
    with pytest.raises(ValueError, match="k = 0"):
        mean_last(values, 0)


# ---- bad input, everywhere


@pytest.mark.parametrize(
    "call",
    [
        user_accuracy,
        std,
        worst_share,
        jain,
        mean_t,
        last,
        lambda v: weighted_accuracy(v, v),
        lambda v: per_class_accuracy(v, v),
        lambda v: paired_t(v, v),
        lambda v: bootstrap_mean(v, Rng(0)),
        lambda v: mean_last(v, 3),
        lambda v: chosen_on_validation(v, v),
    ],
)
def test_nothing_to_average_is_an_error(call):
    with pytest.raises(ValueError, match="are empty"):
        call([])
    with pytest.raises(ValueError, match="one list of numbers"):
        call([[0.1, 0.2], [0.3, 0.4]])


@pytest.mark.parametrize("call", [user_accuracy, std, worst_share, jain, mean_t])
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_values_that_are_not_finite_are_named(call, bad):
    with pytest.raises(ValueError, match=r"hold (nan|inf) at position 1"):
        call([0.5, bad])
