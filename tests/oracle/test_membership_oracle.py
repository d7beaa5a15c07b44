"""The attacks against their formulas written out plainly, and against optimal tests."""

import numpy as np
import pytest
from scipy.stats import norm, rankdata

from fedkd.privacy.auditing.lira import lira, usable
from fedkd.privacy.auditing.released import released
from fedkd.privacy.auditing.rmia import rmia, tune
from fedkd.rng import Rng


def auc(scores, inside):
    count = inside.sum()
    return (rankdata(scores)[inside].mean() - (count + 1) / 2) / (inside.size - count)


def gaussians(references, canaries, key, deviation):
    """Coins, places and scores of a target (row 0) and of references."""
    g = Rng(key).child("gaussians").numpy()
    inside = g.random((references + 1, canaries)) < 0.5
    place = g.normal(0, 5, canaries)
    scores = place + inside + deviation * g.normal(0, 1, inside.shape)
    return inside, place, scores


@pytest.mark.parametrize("fixed", [True, False])
def test_lira_online_is_the_ratio_of_two_normals(fixed):
    inside, _, scores = gaussians(9, 40, 1, 0.8)
    got = lira(scores[0], scores[1:], inside[1:], online=True, fixed_variance=fixed)
    sides = [[scores[1:, i][inside[1:, i] == s] for i in range(40)] for s in (True, False)]
    pooled = [
        np.sqrt(sum(((v - v.mean()) ** 2).sum() for v in side if len(v) > 1)
                / sum(len(v) - 1 for v in side if len(v) > 1))
        for side in sides
    ]  # fmt: skip
    for i in range(40):
        into, out = (side[i] for side in sides)
        if min(len(into), len(out)) < (1 if fixed else 2):
            assert np.isnan(got[i])
            continue
        s_in, s_out = pooled if fixed else (into.std(ddof=1), out.std(ddof=1))
        want = norm.logpdf(scores[0, i], np.median(into), s_in)
        want -= norm.logpdf(scores[0, i], np.median(out), s_out)
        assert got[i] == pytest.approx(want, rel=1e-9)


def test_lira_offline_orders_as_the_tail_of_the_out_normal():
    inside, _, scores = gaussians(9, 60, 2, 0.8)
    got = lira(scores[0], scores[1:], inside[1:], online=False, fixed_variance=False)
    for i in np.flatnonzero(usable(inside[1:], online=False, least=2)):
        out = scores[1:, i][~inside[1:, i]]
        tail = norm.sf(scores[0, i], np.median(out), out.std(ddof=1))
        assert norm.sf(got[i]) == pytest.approx(tail, rel=1e-9)


def test_with_many_references_lira_reaches_the_optimal_test_of_equal_normals():
    inside, _, scores = gaussians(200, 4000, 3, 0.7)
    for fixed in (True, False):
        got = lira(scores[0], scores[1:], inside[1:], online=True, fixed_variance=fixed)
        # Two normals one apart, of deviation .7: the area is Phi(1 / (.7 sqrt 2)) = .844.
        # The standard error of the area with 2,000 in and 2,000 out is .006.
        assert auc(got, inside[0]) == pytest.approx(norm.cdf(1 / (0.7 * np.sqrt(2))), abs=0.018)
    raw = auc(scores[0], inside[0])
    assert raw < 0.6


def test_own_variances_reach_the_optimal_test_of_unequal_normals():
    deviation = np.exp(Rng(4).numpy().normal(0, 0.8, 4000))
    inside, place, scores = gaussians(300, 4000, 4, deviation)
    optimal = norm.logpdf(scores[0], place + 1, deviation) - norm.logpdf(
        scores[0], place, deviation
    )
    own = lira(scores[0], scores[1:], inside[1:], online=True)
    common = lira(scores[0], scores[1:], inside[1:], online=True, fixed_variance=True)
    best = auc(optimal, inside[0])
    assert auc(own, inside[0]) == pytest.approx(best, abs=0.01)
    assert auc(common, inside[0]) < best - 0.03


def rmia_by_hand(p, ref, inside, z, zref, gamma, a):
    """Counts of beaten public examples, one pair at a time, with plain probabilities."""
    counts = []
    for i in range(len(p)):
        out, into = ref[~inside[:, i], i], ref[inside[:, i], i]
        if len(out) == 0 or (a is None and len(into) == 0):
            counts.append(None)
            continue
        px = (out.mean() + into.mean()) / 2 if a is None else (1 + a) / 2 * out.mean() + (1 - a) / 2
        beaten = 0
        for j in range(len(z)):
            pz = zref[:, j].mean() if a is None else (1 + a) / 2 * zref[:, j].mean() + (1 - a) / 2
            beaten += (p[i] / px) / (z[j] / pz) > gamma
        counts.append(beaten)
    return counts


@pytest.mark.parametrize("a", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_rmia_counts_pairs(a, gamma):
    g = Rng(6).numpy()
    inside = g.random((3, 50)) < 0.5
    p, ref = g.random(50), g.random((3, 50))
    z, zref = g.random(70), g.random((3, 70))
    got = rmia(
        np.log(p), np.log(ref), inside, np.log(z), np.log(zref),
        online=a is None, gamma=gamma, a=a,
    )  # fmt: skip
    for one, want in zip(got, rmia_by_hand(p, ref, inside, z, zref, gamma, a), strict=True):
        if want is None:
            assert np.isnan(one)
        else:
            assert np.floor(one * 71) == want


def test_the_tuned_scale_is_the_best_against_held_out_references():
    g = Rng(7).numpy()
    inside = g.random((4, 300)) < 0.5
    logs = -np.logaddexp(0, -(g.normal(-1, 2, 300) + g.normal(0, 0.4, (4, 300)) + 0.7 * inside))
    means = []
    for a in np.arange(11) / 10:
        areas = []
        for k in range(4):
            rest = [j for j in range(4) if j != k]
            judged = [i for i in range(300) if not inside[rest, i].all()]
            ratio = [
                np.exp(logs[k, i])
                / ((1 + a) / 2 * np.mean([np.exp(logs[j, i]) for j in rest if not inside[j, i]])
                   + (1 - a) / 2)
                for i in judged
            ]  # fmt: skip
            areas.append(auc(np.array(ratio), inside[k, judged]))
        means.append(np.mean(areas))
    assert tune(logs, inside) == pytest.approx(np.argmax(means) / 10)
    assert max(means) > min(means) + 0.02


def test_releases_are_projected_on_the_difference_of_means():
    g = Rng(8).numpy()
    inside = g.random((7, 25)) < 0.5
    known, aim = g.normal(5, 2, (7, 40)), g.normal(5, 2, 40)
    known[:, 11] = 3.0
    got = released(aim, known, inside)
    parts = {}
    for i in range(25):
        into, out = known[inside[:, i]], known[~inside[:, i]]
        if not len(into) or not len(out):
            assert np.isnan(got[i])
            continue
        d = into.mean(0) - out.mean(0)
        rest = np.concatenate([(into - into.mean(0)) @ d, (out - out.mean(0)) @ d])
        middle = (into.mean(0) + out.mean(0)) / 2
        parts[i] = ((aim - middle) @ d, (rest**2).sum(), d @ d)
    common = sum(p[1] for p in parts.values()) / (5 * sum(p[2] for p in parts.values()))
    for i, (projected, scatter, length) in parts.items():
        spread = np.sqrt((scatter + 4 * common * length) / (5 + 4))
        assert got[i] == pytest.approx(projected / spread, rel=1e-9)


def test_releases_reach_the_optimal_test_when_references_are_many():
    g = Rng(9).child("releases").numpy()
    canaries, runs, noise = 300, 3000, 1.2
    # Each canary moves one coordinate of its own by one: the best test looks at it alone.
    inside = g.random((runs + 1, canaries)) < 0.5
    releases = inside + g.normal(0, noise, inside.shape)
    scores = released(releases[0], releases[1:].astype(np.float32), inside[1:])
    best = norm.cdf(1 / (noise * np.sqrt(2)))
    assert auc(scores, inside[0]) == pytest.approx(best, abs=0.07)
    few = released(releases[0], releases[1:5], inside[1:5])
    judged = ~np.isnan(few)
    assert auc(few[judged], inside[0][judged]) < auc(scores, inside[0]) - 0.05
