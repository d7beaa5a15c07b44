"""Who takes part: nested over ratios, addressed by round and client, the right number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.clients.participation import Participation
from fedkd.errors import ConfigError
from fedkd.options import build

schemes = st.sampled_from(["fixed", "poisson"])
ratios = st.floats(0.001, 1.0)


@given(
    scheme=schemes,
    ratios=st.tuples(ratios, ratios),
    seed=st.integers(0, 10**6),
    round_=st.integers(1, 100),
    n=st.integers(1, 30),
)
def test_cohorts_are_nested_over_ratios(scheme, ratios, seed, round_, n):
    small, large = (
        Participation(scheme=scheme, ratio=r).cohort(seed, round_, range(n)) for r in sorted(ratios)
    )
    assert set(small) <= set(large) <= set(range(n))
    assert small == sorted(set(small))
    assert large == sorted(set(large))


@given(ratio=ratios, seed=st.integers(0, 10**6), n=st.integers(1, 30))
def test_fixed_cohorts_have_a_fixed_size(ratio, seed, n):
    cohort = Participation(scheme="fixed", ratio=ratio).cohort(seed, 3, range(n))
    assert len(cohort) == max(1, round(ratio * n))


@given(scheme=st.sampled_from(["full", "fixed", "poisson"]), seed=st.integers(0, 10**6))
def test_everybody_takes_part_at_ratio_one(scheme, seed):
    assert Participation(scheme=scheme, ratio=1.0).cohort(seed, 1, [4, 0, 2]) == [0, 2, 4]


def test_full_ignores_the_ratio():
    assert Participation(scheme="full", ratio=0.1).cohort(0, 1, range(5)) == [0, 1, 2, 3, 4]


def test_one_coin_for_each_client_and_round():
    """Other clients, and their order, do not change whether one takes part under poisson."""
    part = Participation(scheme="poisson", ratio=0.5)
    everybody = part.cohort(7, 4, range(20))
    assert part.cohort(7, 4, range(19, -1, -1)) == everybody
    assert part.cohort(7, 4, range(10)) == [k for k in everybody if k < 10]
    assert part.cohort(7, 5, range(20)) != everybody
    assert part.cohort(8, 4, range(20)) != everybody


def test_rates():
    part = Participation(scheme="poisson", ratio=0.3)
    sizes = np.array([len(part.cohort(0, r, range(50))) for r in range(1, 201)])
    # 10,000 coins: the mean's standard error is 0.23, the variance of one cohort is 10.5.
    assert abs(sizes.mean() - 15) < 0.8
    assert 7.5 < sizes.var() < 14
    fixed = Participation(scheme="fixed", ratio=0.3)
    taken = np.bincount(np.concatenate([fixed.cohort(0, r, range(10)) for r in range(1, 301)]))
    assert taken.sum() == 900
    assert abs(taken - 90).max() < 35, "every client has its turn"


def test_poisson_may_be_empty_and_fixed_never():
    rare = Participation(scheme="poisson", ratio=1e-9)
    assert rare.cohort(0, 1, range(20)) == []
    assert len(Participation(scheme="fixed", ratio=1e-9).cohort(0, 1, range(20))) == 1


@pytest.mark.parametrize("ratio", [0, -0.1, 1.1, float("nan")])
def test_impossible_ratios_are_refused(ratio):
    with pytest.raises(ConfigError, match=r"participation\.ratio"):
        build(Participation, {"ratio": ratio}, "participation")
