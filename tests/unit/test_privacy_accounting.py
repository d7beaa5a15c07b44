"""Accounting: published vectors, the traps of the libraries below, and the laws of composition."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from fedkd.errors import CheckpointError, ConfigError
from fedkd.privacy.accounting import (
    ACCOUNTANTS,
    History,
    calibrate,
    delta_of,
    effective,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    joint,
)

DELTA = 1e-5
BOTH = pytest.mark.parametrize("accountant", ACCOUNTANTS)


def rounds(z: float, q: float, steps: int = 100) -> History:
    return History([(z, q, steps)])


# Published and verified numbers.


def test_the_vectors_of_opacus():
    assert epsilon(rounds(1.5, 0.04, 2250), DELTA) == pytest.approx(7.32911117143, abs=1e-9)
    prv = epsilon(rounds(1.5, 0.04, 2250), DELTA, "prv")
    # Equal up to the mesh: both bounds carry an error of 0.01 by construction.
    assert prv == pytest.approx(6.777395712150674, abs=0.005)
    mixed = History([(1, 0.05, 400), (10, 1, 50)])
    assert epsilon(mixed, DELTA) == pytest.approx(8.28, abs=0.005)
    assert epsilon(mixed, DELTA, "prv") == pytest.approx(7.55, abs=0.01)


@pytest.mark.parametrize(
    ("z", "q", "rdp", "prv"),
    [
        (1, 0.05, 4.04, 3.51),
        (1, 0.1, 7.90, 7.06),
        (1, 0.2, 15.97, 14.54),
        (1, 0.5, 42.87, 39.99),
        (1, 1.0, 96.12, 91.83),
        (2, 0.05, 1.22, 1.11),
        (2, 0.1, 2.58, 2.35),
        (2, 0.2, 5.50, 5.03),
        (2, 0.5, 15.39, 14.30),
        (2, 1.0, 35.08, 33.11),
    ],
)
def test_the_table_of_client_level_rounds(z, q, rdp, prv):
    assert epsilon(rounds(z, q), DELTA) == pytest.approx(rdp, abs=0.0051)
    # Unsampled rounds are exact here, so they lie 0.01 below the numerical bound of the table.
    assert epsilon(rounds(z, q), DELTA, "prv") == pytest.approx(prv, abs=0.016)


@pytest.mark.parametrize(
    ("q", "noise"),
    [
        (0.01, (1.084, 0.642, 0.501)),
        (0.1, (4.297, 1.482, 0.994)),
        (1.0, (40.625, 11.582, 6.377)),
    ],
)
def test_the_table_of_calibrated_noise(q, noise):
    for target, z in zip((1, 4, 8), noise, strict=True):
        found = calibrate(target, DELTA, lambda z: rounds(z, q))
        assert found == pytest.approx(z, rel=0.01)
        assert target - 0.01 <= epsilon(rounds(found, q), DELTA) <= target


def test_calibrated_noise_of_opacus():
    assert calibrate(8, DELTA, lambda z: rounds(z, 0.04, 2000)) == pytest.approx(1.3562, abs=2e-3)
    prv = calibrate(8, DELTA, lambda z: rounds(z, 0.04, 2000), "prv")
    assert prv == pytest.approx(1.2915, abs=2e-3)


@pytest.mark.parametrize(
    ("eps", "mu"),
    [(0.5, 0.1422), (1, 0.2681), (2, 0.5016), (4, 0.9249), (8, 1.6660), (10, 2.0004)],
)
def test_the_table_of_the_exact_gaussian(eps, mu):
    assert gaussian_epsilon(mu, DELTA) == pytest.approx(eps, rel=5e-4)
    assert gaussian_delta(mu, gaussian_epsilon(mu, DELTA)) == pytest.approx(DELTA, rel=1e-6)


@pytest.mark.parametrize(
    ("claimed", "true"), [(8, 7.91), (8.5, 8.52), (10, 10.39), (15, 17.4), (20, 25.4)]
)
def test_the_classic_gaussian_formula_claims_too_little_where_epsilon_is_large(claimed, true):
    sigma = math.sqrt(2 * math.log(1.25 / DELTA)) / claimed
    assert gaussian_epsilon(1 / sigma, DELTA) == pytest.approx(true, rel=2e-3)


# Traps.


@BOTH
def test_nothing_spent_is_zero_and_no_noise_is_infinite(accountant):
    for free in (History(), rounds(0.0, 0.0), rounds(math.inf, 0.5), rounds(1.0, 0.5, 0)):
        assert epsilon(free, DELTA, accountant) == 0.0
        assert delta_of(free, 0.0, accountant) == 0.0
    for open_ in (rounds(0.0, 0.1), History([(0.0, 1.0, 1), (5.0, 0.1, 3)])):
        assert epsilon(open_, DELTA, accountant) == math.inf
        assert delta_of(open_, 50.0, accountant) == 1.0


def test_the_floor_of_renyi_accounting_is_far_below_that_of_opacus():
    assert 0 < epsilon(rounds(1e6, 0.5), DELTA) < 0.01
    assert epsilon(rounds(1e6, 0.5), DELTA, "prv") < 0.011


@BOTH
def test_epsilon_is_never_negative(accountant):
    assert epsilon(rounds(10.0, 0.01, 1), 0.5, accountant) == 0.0


@BOTH
@pytest.mark.parametrize("q", [1e-9, 0.3, 0.999999, 1.0])
def test_extreme_noise_neither_crashes_nor_lies(accountant, q):
    for z in (1e-310, 1e-200, 1e-8, 1e-3):
        assert epsilon(rounds(z, q), DELTA, accountant) > 1e4
    for z in (1e6, 1e150, 1e300):
        assert epsilon(rounds(z, q), DELTA, accountant) < 0.011


@BOTH
@pytest.mark.parametrize("delta", [1e-300, 1e-15, 1e-9, 0.3, 1 - 1e-12])
def test_any_delta_has_an_epsilon(accountant, delta):
    assert 0 <= epsilon(rounds(1.0, 0.1), delta, accountant) < 200


def test_an_accountant_that_reports_too_little_is_not_on_offer():
    with pytest.raises(ConfigError, match=r"unknown accountant 'gdp'.*allowed: prv, rdp"):
        epsilon(rounds(1.0, 0.1), DELTA, "gdp")


@BOTH
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_lies_between_zero_and_one(accountant, delta):
    with pytest.raises(ConfigError, match="delta"):
        epsilon(rounds(1.0, 0.1), delta, accountant)


# Histories.


def test_alternating_mechanisms_stay_two_entries():
    history = History()
    for _ in range(100):
        history.add(1.0, 0.1)
        history.add(4.0, 1.0)
    assert history.events() == [(1.0, 0.1, 100), (4.0, 1.0, 100)]
    assert history == History(reversed(history.events()))


def test_histories_never_alias():
    first = rounds(1.0, 0.1, 3)
    second = first.joined(History())
    second.add(1.0, 0.1)
    rows = first.rows()
    rows[:] = 0
    first.events().clear()
    assert first.events() == [(1.0, 0.1, 3)] and second.events() == [(1.0, 0.1, 4)]


def test_rows_keep_everything():
    history = History([(math.inf, 0.5, 1), (0.1 + 0.2, 1 / 3, 10**9), (0.0, 1.0, 2)])
    assert history.rows().dtype == np.float64 and history.rows().shape == (3, 3)
    assert History.from_rows(history.rows()) == history
    assert History.from_rows(History().rows()) == History() and not History()


@pytest.mark.parametrize(
    "rows", [np.zeros(3), np.zeros((1, 2)), [[1, 0.5, 0.5]], [[-1, 0.5, 1]], [[1, 1, np.nan]]]
)
def test_rows_of_no_history_are_refused(rows):
    with pytest.raises(CheckpointError, match="privacy history"):
        History.from_rows(np.asarray(rows))


@pytest.mark.parametrize(
    ("event", "word"),
    [
        ((-1.0, 0.5, 1), "noise multiplier"),
        ((math.nan, 0.5, 1), "noise multiplier"),
        ((1.0, 1.1, 1), "sampling rate"),
        ((1.0, math.nan, 1), "sampling rate"),
        ((1.0, 0.5, -1), "steps"),
    ],
)
def test_events_out_of_range_are_refused(event, word):
    with pytest.raises(ConfigError, match=word):
        History([event])


# Laws.

noise = st.floats(0.4, 20)
rate = st.floats(0.001, 1)
steps = st.integers(1, 2000)


@quick(max_examples=12)
@given(noise, rate, steps, st.floats(1.01, 3))
def test_renyi_epsilon_moves_the_right_way(z, q, n, factor):
    base = epsilon(rounds(z, q, n), DELTA)
    assert epsilon(rounds(z * factor, q, n), DELTA) <= base * (1 + 1e-9)
    assert epsilon(rounds(z, q / factor, n), DELTA) <= base * (1 + 1e-9)
    assert epsilon(rounds(z, q, math.ceil(n * factor)), DELTA) >= base * (1 - 1e-9)
    assert epsilon(rounds(z, q, n), DELTA / factor) >= base


@pytest.mark.parametrize("other", [(3.0, 0.1, 50), (2.0, 0.05, 50), (2.0, 0.1, 49)])
def test_numerical_epsilon_moves_the_right_way(other):
    assert epsilon(History([other]), DELTA, "prv") < epsilon(rounds(2.0, 0.1, 50), DELTA, "prv")


@quick(max_examples=10)
@given(st.lists(st.tuples(noise, rate, steps), min_size=2, max_size=4))
def test_the_order_of_releases_is_irrelevant(events):
    forward, backward = History(events), History(reversed(events))
    assert epsilon(forward, DELTA) == epsilon(backward, DELTA)
    assert epsilon(forward, DELTA) >= max(epsilon(History([e]), DELTA) for e in events) - 1e-9


@quick(max_examples=40)
@given(st.lists(st.floats(0.05, 1e4), min_size=1, max_size=5))
def test_parts_of_one_release_cost_what_the_joint_release_costs(multipliers):
    whole = joint(*multipliers)
    assert whole <= min(multipliers) * (1 + 1e-12)
    assert whole**-2 == pytest.approx(sum(z**-2 for z in multipliers), rel=1e-9)
    parts = History((z, 1.0, 1) for z in multipliers)
    # Without sampling, one release of all parts is the composition of the parts.
    for accountant in ACCOUNTANTS:
        both = epsilon(parts, DELTA, accountant), epsilon(rounds(whole, 1.0, 1), DELTA, accountant)
        assert both[0] == pytest.approx(both[1], rel=1e-6, abs=1e-12)


def test_two_releases_on_one_cohort_are_not_two_sampled_releases():
    # On one Poisson sample the two parts are hidden together or not at all: that costs more.
    apart = epsilon(History([(2.0, 0.05, 200)]), DELTA, "prv")
    together = epsilon(History([(joint(2.0, 2.0), 0.05, 100)]), DELTA, "prv")
    assert together > apart


@pytest.mark.parametrize("extreme", [(1e-300, 1.0), (1e-310, 2.0), (1e300, math.inf), (0.0, 1.0)])
def test_joint_survives_extremes(extreme):
    assert joint(*extreme) == pytest.approx(min(extreme), rel=1e-9, abs=1e-305)
    with pytest.raises(ConfigError, match="noise multipliers"):
        joint(-1.0, 1.0)


def test_replacing_a_unit_costs_twice_its_sensitivity():
    assert [effective(3.0, a) for a in ("add-remove", "zero-out", "replace-one")] == [3.0, 3.0, 1.5]
    with pytest.raises(ConfigError, match="did you mean 'replace-one'"):
        effective(1.0, "replace one")


# Any two of epsilon, delta and noise give the third.


@BOTH
@pytest.mark.parametrize("q", [0.1, 1.0])
def test_epsilon_and_delta_invert_each_other(accountant, q):
    history = rounds(2.0, q, 20)
    eps = epsilon(history, DELTA, accountant)
    found = delta_of(history, eps, accountant)
    assert found == pytest.approx(DELTA, rel=0.02)
    assert epsilon(history, min(found * 1.0001, 0.5), accountant) <= eps * (1 + 1e-6)
    assert delta_of(history, 2 * eps, accountant) < found < delta_of(history, eps / 2, accountant)
    assert delta_of(history, math.inf, accountant) == 0.0


@quick(max_examples=15)
@given(noise, rate, steps, st.floats(0, 50))
def test_a_delta_really_gives_its_epsilon(z, q, n, eps):
    found = delta_of(rounds(z, q, n), eps)
    assert 0 <= found <= 1
    if 1e-290 < found < 0.99:
        assert epsilon(rounds(z, q, n), found) <= eps + 1e-6


def mixed(z: float) -> History:
    """Sampled training, a release at half its noise, and one whose noise is fixed."""
    return History([(z, 0.1, 30), (z / 2, 1.0, 1), (50.0, 1.0, 1)])


@BOTH
def test_calibrated_noise_is_enough_and_not_too_much(accountant):
    z = calibrate(3.0, DELTA, mixed, accountant)
    assert 2.99 <= epsilon(mixed(z), DELTA, accountant) <= 3.0


@BOTH
def test_a_target_below_what_is_fixed_is_refused(accountant):
    with pytest.raises(ConfigError, match=r"cannot be reached.*still reports.*Raise epsilon"):
        calibrate(0.05, DELTA, mixed, accountant)


def test_calibration_at_the_ends():
    assert calibrate(1.0, DELTA, lambda z: rounds(z, 0.0)) == 0.0
    assert calibrate(math.inf, DELTA, lambda z: rounds(z, 0.5)) == 0.0
    big = calibrate(1e9, DELTA, lambda z: rounds(z, 1.0, 1))
    assert 0 < big < 1e-3 and epsilon(rounds(big, 1.0, 1), DELTA) <= 1e9
    with pytest.raises(ConfigError, match=r"accountant = .prv"):
        calibrate(1e-3, DELTA, lambda z: rounds(z, 0.1))
    with pytest.raises(ConfigError, match="positive"):
        calibrate(0.0, DELTA, lambda z: rounds(z, 0.1))


def test_the_exact_gaussian_at_its_limits():
    assert gaussian_delta(0.0, 1.0) == 0.0 and gaussian_delta(math.inf, 5.0) == 1.0
    assert gaussian_delta(1.0, 0.0) == pytest.approx(math.erf(0.5 / math.sqrt(2)))
    assert gaussian_delta(1.0, math.inf) == 0.0 and gaussian_delta(1.0, -800.0) == 1.0
    assert gaussian_epsilon(1e-9, DELTA) == 0.0 and gaussian_epsilon(1e200, DELTA) == math.inf
    with pytest.raises(ConfigError, match="mu"):
        gaussian_delta(-1.0, 1.0)
