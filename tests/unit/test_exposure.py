"""Exposure: what is said at its edges, what is refused, and that no order of canaries matters."""

import math

import numpy as np
import pytest

from fedkd.errors import ConfigError, DataError
from fedkd.privacy.exposure import (
    NULL_BITS,
    bound,
    exact,
    excess,
    exposure,
    extrapolated,
    interpolated,
    level_at,
    mean,
    rank,
    reduction,
)
from fedkd.privacy.exposure_fit import SkewNormal
from fedkd.rng import Rng
from fedkd.types import Estimate

RNG = Rng(5).child("exposure")
REFERENCES = Rng(0).numpy().normal(30, 3, size=1000)


def test_everything_memorised_gives_log2_of_the_space():
    space = np.arange(1000.0)
    one = exact([0.0], space)
    assert one.bits.tolist() == [math.log2(1000)] and one.saturated.all() and not one.notes
    many = exact(np.zeros(5), np.append(np.zeros(5), np.arange(1.0, 996)))
    assert many.bits.tolist() == [many.ceiling] * 5 == [math.log2(996)] * 5
    assert "without them 995 of 1000" in many.notes[0]


def test_canaries_do_not_compete_in_the_space_either():
    space = np.array([0.1, 0.2, 0.3, 5, 6, 7, 8, 9])
    assert exact([0.1, 0.2, 0.3], space).bits.tolist() == [math.log2(6)] * 3
    # A canary that was drawn twice is one secret; an equal loss of another secret counts.
    assert exact([0.1, 0.1], space).bits.tolist() == [3.0, 3.0]
    assert exact([0.1], [0.1, 0.1, 2, 3]).bits.tolist() == [1.0]


def test_rounding_in_another_batch_costs_no_rank():
    space = np.array([1e-3, 1.0, 2.0, 3.0])
    for noise in (-1e-6, 0.0, 1e-6):
        assert exact([1e-3 + noise], space).bits.tolist() == [2.0]
        assert exact([2.0 + noise], space).bits[0] == pytest.approx(2 - math.log2(3))


def test_interpolation_is_flagged_where_it_ends():
    found = interpolated([1.0, 30.0, 99.0], REFERENCES)
    assert found.saturated.tolist() == [True, False, False]
    assert found.ceiling == found.bits[0] == math.log2(1000)
    assert "1 of 3 canaries rank before all 1000 references" in found.notes[0]
    assert math.isnan(found.fit)


def test_extrapolation_is_capped_at_the_space_and_says_what_rests_on_the_fit():
    found = extrapolated([-20.0, 30.0, 99.0], REFERENCES, space=10**6)
    assert found.method == "extrapolation" and found.fit > 0.01
    assert found.bits[0] == found.ceiling == math.log2(10**6)
    assert found.saturated.tolist() == [True, False, False]
    assert 0.5 < found.bits[1] < 1.5 and 0 <= found.bits[2] < 1e-9
    assert len(found.notes) == 1 and "rests on the fit alone" in found.notes[0]
    unknown = extrapolated([-20.0, 22.0], REFERENCES)
    assert unknown.bits[0] == unknown.ceiling == 64 and 6 < unknown.bits[1] < 11
    assert "unknown" in unknown.notes[0]


@pytest.mark.parametrize(
    ("references", "said"),
    [
        (np.append(np.zeros(500), np.full(500, 9.0)), "not skew-normal"),
        (np.full(1000, 3.0), "converged"),
        (Rng(1).numpy().exponential(size=1000), "converged"),
    ],
)
def test_where_no_fit_holds_ranks_are_used(references, said):
    found, plain = extrapolated([-1.0, 4.0], references), interpolated([-1.0, 4.0], references)
    assert found.method == "interpolation" and found.ceiling == plain.ceiling
    np.testing.assert_array_equal(found.bits, plain.bits)
    assert said in found.notes[0] and "interpolated instead" in found.notes[0]
    assert not found.fit >= 0.01


def test_auto_takes_the_best_that_can_be_justified():
    space = np.append(REFERENCES, 1.0)
    assert exposure([1.0], space, space=1001).method == "exact"
    assert exposure([1.0], REFERENCES, space=10**6).method == "extrapolation"
    assert exposure([1.0], np.arange(1000.0) ** 4).method == "interpolation"
    for chosen in ("interpolation", "extrapolation"):
        assert exposure([1.0], space, 1001, chosen).method == chosen


@pytest.mark.parametrize("estimator", ["exact", "interpolation", "extrapolation"])
def test_permuted_in_permuted_out(estimator):
    space = np.append(REFERENCES, Rng(3).numpy().normal(27, 4, size=40))
    canaries, size = space[-40:], len(space)
    order, shuffled = RNG.numpy().permutation(40), RNG.child("space").numpy().permutation(size)
    found = exposure(canaries, space, size, estimator)
    again = exposure(canaries[order], space[shuffled], size, estimator)
    np.testing.assert_array_equal(again.bits, found.bits[order])
    np.testing.assert_array_equal(again.saturated, found.saturated[order])
    assert (again.method, again.ceiling, again.notes) == (found.method, found.ceiling, found.notes)


def test_intervals_do_not_depend_on_the_order_of_canaries_nor_on_when_they_are_asked():
    t, s = Rng(1).numpy().gamma(4, 2, 30), Rng(2).numpy().gamma(2, 1, 30)
    order = RNG.numpy().permutation(30)
    assert mean(t, RNG) == mean(t[order], RNG) != mean(t, RNG.child("other"))
    assert reduction(t, s, RNG) == reduction(t[order], s[order], RNG)


def test_means_and_excess_say_what_they_are():
    assert Estimate(2.5, 2.5, 2.5, 4, "BCa bootstrap 95%") == mean([2.5] * 4, RNG)
    assert math.isnan(mean([3.0], RNG).low)
    found = mean(Rng(4).numpy().gamma(4, 2, 30), RNG)
    assert excess(found).value == found.value - NULL_BITS
    assert excess(found).high - excess(found).low == pytest.approx(found.high - found.low)


def test_reductions_raw_and_as_excess():
    t = np.linspace(9, 11, 20)
    raw, beyond = reduction(t, np.full(20, NULL_BITS), RNG)
    assert beyond == Estimate(1.0, 1.0, 1.0, 20, "paired bootstrap 95%")
    # The same student, which knows nothing, seems to leak 14 % by the raw share.
    assert raw.value == pytest.approx(1 - NULL_BITS / 10) and raw.low < raw.value < raw.high
    same = reduction(t, t, RNG)
    assert [(one.value, one.low, one.high) for one in same] == [(0, 0, 0)] * 2
    worse, _ = reduction(t, 2 * t, RNG)
    assert worse.value == pytest.approx(-1)


def test_a_share_of_nothing_is_no_number():
    raw, beyond = reduction([1.0, 1.2, 1.4], [0.5, 0.4, 0.6], RNG)
    assert 0 < raw.value < 1
    assert (
        math.isnan(beyond.value)
        and "1.2 bits, is not above the null level of 1.44" in beyond.method
    )
    raw, _ = reduction([-0.05, -0.05], [1.0, 1.0], RNG)
    assert math.isnan(raw.value) and "bits, is not above 0" in raw.method
    # Above the null level, but not in every resample.
    _, beyond = reduction([0.0, 1.0, 4.0], [0.5, 0.5, 0.5], RNG)
    assert (
        math.isfinite(beyond.value)
        and math.isnan(beyond.low)
        and "may be nothing" in str(beyond.method)
    )
    one, _ = reduction([5.0], [2.0], RNG)
    assert (one.value, math.isnan(one.high), one.n) == (0.6, True, 1)


@pytest.mark.parametrize(("epsilon", "level"), [(1.0, 8.09), (4.0, 12.41), (8.0, 18.19)])
def test_the_level_of_one_per_cent(epsilon, level):
    assert round(level_at(epsilon, 0.0), 2) == level
    assert level_at(epsilon, 0.0) == pytest.approx(epsilon / math.log(2) + math.log2(100))
    assert bound([level_at(epsilon, 1e-5)], epsilon, 1e-5) == pytest.approx(0.01)
    assert level_at(epsilon, 1e-5, 0.05, copies=3) > level_at(epsilon, 1e-5, 0.05)


def test_copies_cost_as_groups_do():
    for epsilon, k in ((0.5, 1), (0.5, 4), (2.0, 3)):
        delta = 1e-6 * (math.exp(k * epsilon) - 1) / (math.exp(epsilon) - 1)
        expected = math.exp(k * epsilon) * 2.0**-15 + delta
        assert bound([15.0], epsilon, 1e-6, k)[0] == pytest.approx(expected, rel=1e-12)
    assert bound([60.0], 0.0, 1e-6, 5)[0] == pytest.approx(5e-6)
    np.testing.assert_array_equal(bound([3, 10.0], 0.2, 1e-6, 6) >= bound([3, 10.0], 0.2, 0, 6), 1)


def test_bounds_at_their_limits():
    assert bound([0.0, 50.0], math.inf, 0.0).tolist() == [1.0, 1.0]
    assert level_at(math.inf, 0.0) == level_at(1.0, 0.01) == math.inf
    assert bound([-1.0, 0.0, math.inf], 0.0, 0.0).tolist() == [1.0, 1.0, 0.0]
    assert bound([5.0], 400.0, 1e-5, 32).tolist() == [1.0]
    assert bound([40.0], 1e-12, 1e-6, 3)[0] == pytest.approx(3e-6, rel=1e-3)
    assert level_at(0.0, 0.0, 1.0) == 0.0


def test_what_cannot_be_scored_is_refused():
    good = REFERENCES
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(DataError, match=r"canary losses: .* at position 1 .*diverged"):
            exposure([1.0, bad], good)
        with pytest.raises(DataError, match="reference losses"):
            exposure([1.0], np.append(good, bad))
        with pytest.raises(DataError, match="finite"):
            mean([1.0, bad], RNG)
    for call in (rank, interpolated, extrapolated, exposure, exact):
        with pytest.raises(DataError, match="no canary to score"):
            call([], good)
        with pytest.raises(DataError, match="no reference to score"):
            call([1.0], [])
    with pytest.raises(DataError, match="shape"):
        rank([[1.0]], good)
    for call in (extrapolated, exposure):
        with pytest.raises(DataError, match=r"19 references are too few.*20.*canaries.references"):
            call([1.0], good[:19])
        assert call([1.0], good[:20]).bits.shape == (1,)


def test_a_space_that_cannot_be_is_refused():
    with pytest.raises(DataError, match="1000 references, but only 900 secrets"):
        exposure([1.0], REFERENCES, 900, "exact")
    with pytest.raises(DataError, match=r"all secrets .*their number: 2000.* 1000"):
        exposure([1.0], REFERENCES, 2000, "exact")
    with pytest.raises(DataError, match="unknown"):
        exposure([1.0], REFERENCES, estimator="exact")
    with pytest.raises(DataError, match="canary 1 has the loss 1, which none of the 1000"):
        exposure([REFERENCES[7], 1.0], REFERENCES, 1000)
    with pytest.raises(DataError, match="none is left"):
        exact([1.0, 2.0], [2.0, 1.0])
    for space in (0, -1.0, math.nan):
        with pytest.raises(ConfigError, match="space"):
            exposure([1.0], REFERENCES, space)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'extrapolation'"):
        exposure([1.0], REFERENCES, estimator="extrapolated")
    with pytest.raises(DataError, match="2 canaries of the teacher but 1"):
        reduction([1.0, 2.0], [1.0], RNG)
    with pytest.raises(DataError, match="no canary"):
        reduction([], [], RNG)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="confidence"):
            mean([1.0, 2.0], RNG, confidence)
    for epsilon, delta, copies, probability in (
        (-1, 0, 1, 0.01),
        (math.nan, 0, 1, 0.01),
        (1, 2, 1, 0.01),
        (1, 0, 0, 0.01),
        (1, 0, 1.5, 0.01),
        (1, 0, 1, 0.0),
    ):
        with pytest.raises(ConfigError, match=r"epsilon|delta|copies|probability"):
            level_at(epsilon, delta, probability, copies)
    with pytest.raises(ConfigError, match="NaN"):
        bound([math.nan], 1.0, 0.0)


def test_a_fit_follows_the_units_and_not_the_order():
    one = SkewNormal.fit(REFERENCES)
    assert one is not None and one == SkewNormal.fit(REFERENCES[::-1])
    shrunk = SkewNormal.fit(REFERENCES * 2.0**-12)
    assert shrunk is not None
    np.testing.assert_allclose(
        shrunk.log_cdf([22 * 2.0**-12, 30 * 2.0**-12]), one.log_cdf([22, 30]), rtol=2e-3
    )
    assert SkewNormal.fit(np.ones(50)) is None


def test_an_optimiser_that_stops_short_is_noticed(monkeypatch):
    short = (0.0, REFERENCES.mean() + 1, REFERENCES.std())
    monkeypatch.setattr("scipy.stats.skewnorm.fit", lambda values: short)
    assert SkewNormal.fit(REFERENCES) is None
    found = extrapolated([1.0], REFERENCES)
    assert found.method == "interpolation" and "converged" in found.notes[0]
