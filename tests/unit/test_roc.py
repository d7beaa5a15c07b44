import math

import numpy as np
import pytest
from scipy.stats import norm

from fedkd.errors import ConfigError, DataError
from fedkd.privacy.auditing.roc import auc, roc, tpr_at
from fedkd.rng import Rng

FIRST = np.arange(100)


def test_published_vectors_of_the_hull() -> None:
    hull = roc(FIRST + 9.5, FIRST).hull()
    assert float(hull.at(0.01)) == pytest.approx(0.11, abs=1e-12)
    assert hull.area() == pytest.approx(0.595, abs=1e-12)
    assert roc([0, 4, 6, 7], [1, 2, 3, 5]).hull().area() == pytest.approx(13 / 16, abs=1e-12)
    found = roc([1, 3], [0, 2]).hull().at([0, 0.25, 0.5, 0.75, 1])
    assert found.tolist() == [0.5, 0.75, 1, 1, 1]


def test_curve_has_a_corner_for_each_distinct_score() -> None:
    curve = roc([3, 2, 2, 1], [2, 1, 1, 0])
    assert curve.fpr.tolist() == [0, 0, 0.25, 0.75, 1]
    assert curve.tpr.tolist() == [0, 0.25, 0.75, 1, 1]
    flat = roc([1, 1], [1, 1, 1])
    assert flat.fpr.tolist() == flat.tpr.tolist() == [0, 1]
    assert flat.area() == 0.5


def test_hull_of_an_inverted_attack_is_chance() -> None:
    hull = roc([0, 0], [1, 1]).hull()
    assert hull.at([0, 0.3, 1]).tolist() == [0, 0.3, 1]


def test_area_is_that_of_the_curve_not_of_its_hull() -> None:
    found = auc([0, 4, 6, 7], [1, 2, 3, 5])
    assert found.value == 11 / 16 == roc([0, 4, 6, 7], [1, 2, 3, 5]).area()
    assert 0 < found.low < found.value < found.high < 1


def test_area_counts_ties_half() -> None:
    assert auc(np.ones(5), np.ones(7)).value == 0.5
    assert auc([1, 2], [1, 0]).value == 0.875


def test_certain_areas_keep_an_interval() -> None:
    best, worst = auc(FIRST + 1000, FIRST), auc(FIRST, FIRST + 1000)
    assert (best.value, best.high, worst.value, worst.low) == (1, 1, 0, 0)
    assert 0.95 < best.low < 1 and 0 < worst.high < 0.05 and best.n == 200
    alone = auc([2.0], [1.0, 3.0, 0.0])
    assert alone.value == pytest.approx(2 / 3) and math.isnan(alone.low)


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.5])
def test_interval_of_the_area_covers(mu: float) -> None:
    true, covered = float(norm.cdf(mu / math.sqrt(2))), 0
    for run in range(400):
        draws = Rng(run, ("auc",)).numpy().normal(size=90)
        found = auc(draws[:40] + mu, draws[40:], 0.9)
        covered += found.low <= true <= found.high
    assert 0.86 <= covered / 400 <= 0.94


def test_rate_at_few_false_alarms() -> None:
    outside = np.arange(1000.0)
    inside = np.concatenate([np.full(30, 2000.0), np.full(20, 995.5), np.zeros(50)])
    found = tpr_at(inside, outside, 0.01)
    assert (found.value, found.n) == (0.5, 100) and found.low < 0.5 < found.high
    assert tpr_at(inside, outside, 0.001).value == 0.3
    assert "unresolved" not in tpr_at(inside, outside, 0.001).method
    lowest = tpr_at(inside, outside, 0.0005)
    assert lowest.value == 0.3 and "unresolved below 1/1000" in lowest.method


def test_rate_does_not_lose_an_alarm_to_rounding() -> None:
    # 0.29 x 100 is 28.999999999999996: with 29 alarms allowed the threshold is the score 70.
    assert tpr_at([70.5, 80.0], FIRST, 0.29).value == 1


def test_rate_counts_equal_scores_against_the_attack() -> None:
    assert tpr_at(np.ones(10), np.ones(200), 0.01).value == 0
    assert tpr_at(np.ones(10), np.zeros(200), 0.01).value == 1


def test_rate_covers_that_of_its_threshold() -> None:
    covered = 0
    for run in range(400):
        draws = Rng(run, ("tpr",)).numpy().normal(size=140)
        found = tpr_at(draws[:60] + 1, draws[60:], 0.1, 0.9)
        true = norm.sf(np.sort(draws[60:])[71] - 1)
        covered += found.low <= true <= found.high
    assert covered / 400 >= 0.88


def test_order_does_not_count() -> None:
    generator = Rng(1).numpy()
    inside, outside = generator.integers(0, 9, 80), generator.integers(0, 7, 90)
    shuffled = generator.permutation(inside), generator.permutation(outside)
    assert auc(inside, outside) == auc(*shuffled)
    assert tpr_at(inside, outside, 0.1) == tpr_at(*shuffled, 0.1)


def test_refusals() -> None:
    with pytest.raises(DataError, match="at least one canary"):
        roc([], [1.0])
    with pytest.raises(DataError, match="NaN"):
        auc([math.nan], [1.0])
    with pytest.raises(ConfigError, match="fpr = 0"):
        tpr_at([1.0], [1.0], 0)
    with pytest.raises(ConfigError, match="confidence"):
        auc([1.0], [1.0], 2)
