"""The fast bound against the accountant: never below it, and close enough to search with."""

import pytest

from fedkd.privacy.accounting import History, epsilon
from fedkd.privacy.quick import bound, noise_for

GRID = [(z, q, t) for z in (0.6, 1.0, 2.5) for q in (0.01, 0.1, 0.5, 1.0) for t in (1, 50)]


@pytest.mark.parametrize(("z", "q", "t"), GRID)
def test_the_bound_is_never_below_the_accountant_and_close_to_it(z, q, t):
    history = History([(z, q, t)])
    exact, fast = epsilon(history, 1e-5, "rdp"), bound(history, 1e-5)
    # The accountant truncates its series at fractional orders.
    assert exact <= fast * 1.001
    # Orders below 2 and above 64 are not looked at: those of very large and very small epsilons.
    if 0.3 < exact < 20:
        assert fast <= 1.2 * exact


def test_mixed_histories_add_up():
    history = History([(1.0, 0.1, 20), (8.0, 1.0, 3)])
    assert (
        epsilon(history, 1e-5, "rdp")
        <= bound(history, 1e-5)
        <= 1.02 * epsilon(history, 1e-5, "rdp")
    )


@pytest.mark.parametrize("target", [1.0, 8.0])
def test_the_noise_found_meets_the_target_by_the_accountant(target):
    def at(z):
        return History([(z, 0.3, 80)])

    z = noise_for(target, 1e-5, at)
    assert 0.9 * target <= epsilon(at(z), 1e-5, "rdp") <= target


def test_limits():
    assert bound(History(), 1e-5) < 0.2
    assert bound(History([(0.0, 0.1, 1)]), 1e-5) == float("inf")
    assert bound(History([(1.0, 0.0, 5)]), 1e-5) == bound(History(), 1e-5)
    assert noise_for(1e-6, 1e-5, lambda z: History([(z, 1.0, 10)])) == float("inf")
