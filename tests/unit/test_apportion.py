import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkd.data.apportion import DRAWS, apportion, check_request, fill, settle
from fedkd.errors import ConfigError
from fedkd.rng import Rng

quick = settings(max_examples=100, deadline=None, derandomize=True)


@given(
    weights=st.lists(st.floats(0, 1e6), min_size=1, max_size=30).filter(lambda w: sum(w) > 1e-3),
    total=st.integers(0, 5000),
)
@quick
def test_shares_are_whole_sum_up_and_miss_the_quota_by_less_than_one(weights, total):
    shares = apportion(np.array(weights), total, Rng(0))
    quota = total * np.array(weights) / sum(weights)
    assert shares.sum() == total
    assert np.abs(shares - quota).max() < 1 + 1e-6


def test_ties_go_to_different_clients_for_different_streams():
    winners = {int(apportion(np.ones(10), 1, Rng(seed)).argmax()) for seed in range(40)}
    assert len(winners) >= 8


@given(
    counts=st.lists(st.lists(st.integers(0, 20), min_size=3, max_size=3), min_size=1, max_size=12),
    minimum=st.integers(0, 10),
)
@quick
def test_fill_keeps_each_class_and_reaches_the_minimum_where_that_is_possible(counts, minimum):
    counts = np.array(counts)
    if counts.sum() < minimum * len(counts):
        with pytest.raises(ConfigError, match="min_examples"):
            fill(counts, minimum)
        return
    filled = fill(counts, minimum)
    assert np.array_equal(filled.sum(0), counts.sum(0))
    assert filled.min() >= 0
    assert filled.sum(1).min() >= minimum


def test_settle_stops_after_a_fixed_number_of_draws_and_repairs():
    drawn = []

    def draw(rng):
        drawn.append(rng)
        return np.array([[0], [20]])

    assert settle(draw, 3, Rng(0)).tolist() == [[3], [17]]
    assert len(drawn) == DRAWS


def test_settle_takes_the_first_draw_that_is_good_enough():
    sizes = {0: [1, 9], 1: [4, 6], 2: [5, 5]}
    counts = settle(lambda rng: np.array(sizes[rng.path[-1]])[:, None], 4, Rng(0))
    assert counts[:, 0].tolist() == [4, 6]


def test_an_impossible_request_names_both_ways_out():
    with pytest.raises(ConfigError, match="lower clients to at most 10, or min_examples to at mos"):
        check_request(100, 20, 10)
    with pytest.raises(ConfigError, match="clients = 0"):
        check_request(100, 0, 1)
