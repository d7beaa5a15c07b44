import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.metrics.intervals import bootstrap_mean, paired_t
from fedkd.metrics.paired import paired_bootstrap
from fedkd.rng import stream

RNG = stream(0, "paired")


def sample(seed, shape=(4, 12)):
    generator = stream(seed, "sample").numpy()
    hard = generator.normal(0.7, 0.2, shape)
    return hard + 0.02 + generator.normal(0, 0.01, shape), hard


def test_what_clients_share_cancels():
    a, b = sample(1)
    found = paired_bootstrap(a, b, RNG)
    alone = bootstrap_mean(a.ravel(), RNG)
    assert 0.015 < found.low < found.value < found.high < 0.03
    assert found.high - found.low < (alone.high - alone.low) / 5
    assert found.n == 4
    assert "paired bootstrap over seeds and clients 95%" in found.method
    assert "percentile" in found.method


def test_the_value_is_that_of_the_paired_t_over_seeds():
    a, b = sample(2)
    assert paired_bootstrap(a, b, RNG).value == pytest.approx(
        paired_t(a.mean(axis=1), b.mean(axis=1)).value
    )


def test_one_seed_is_over_clients_and_says_what_it_does_not_cover():
    a, b = sample(3, (1, 12))
    found = paired_bootstrap(a, b, RNG)
    assert found == paired_bootstrap(a[0], b[0], RNG)
    assert found.n == 12
    assert "clients of one seed" in found.method and "not covered" in found.method


def test_clients_without_a_pair_and_seeds_without_any_are_left_out():
    a, b = sample(4)
    a[0, :3], b[1, 5], a[2] = np.nan, np.nan, np.nan
    found = paired_bootstrap(a, b, RNG)
    d = a - b
    assert found.value == pytest.approx(np.mean([np.nanmean(d[i]) for i in (0, 1, 3)]))
    assert found.n == 3
    np.testing.assert_equal(found, paired_bootstrap(np.delete(a, 2, 0), np.delete(b, 2, 0), RNG))


def test_a_single_pair_has_no_interval():
    found = paired_bootstrap([[0.5, np.nan]], [[0.4, 0.3]], RNG)
    assert found.value == pytest.approx(0.1)
    assert found.n == 1 and np.isnan(found.low) and np.isnan(found.high)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([[1.0, 2.0]], [[1.0]], {}, "same seeds and clients"),
        ([[1.0]], [[np.nan]], {}, "no value in common"),
        ([[np.inf]], [[1.0]], {}, "infinite"),
        ([[1.0, 2.0]], [[1.0, 1.0]], {"confidence": 1.0}, "between 0 and 1"),
        ([[1.0, 2.0]], [[1.0, 1.0]], {"resamples": 0}, "at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, RNG, **options)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), seeds=st.integers(1, 4), clients=st.integers(2, 8))
def test_turning_the_two_round_turns_the_interval_round(seed, seeds, clients):
    a, b = sample(seed, (seeds, clients))
    one, other = paired_bootstrap(a, b, RNG), paired_bootstrap(b, a, RNG)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.low <= one.value <= one.high


def test_the_same_address_gives_the_same_bits():
    a, b = sample(5)
    assert paired_bootstrap(a, b, RNG) == paired_bootstrap(a, b, stream(0, "paired"))
    assert paired_bootstrap(a, b, RNG) != paired_bootstrap(a, b, stream(1, "paired"))
