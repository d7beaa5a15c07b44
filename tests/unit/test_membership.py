"""Laws of the three attacks: what they need, what must not matter, and that noise gives nothing."""

import inspect

import numpy as np
import pytest
from scipy.stats import rankdata

from fedkd.errors import ConfigError, DataError
from fedkd.privacy.auditing import rmia as rmia_module
from fedkd.privacy.auditing.lira import lira, phi, usable
from fedkd.privacy.auditing.released import released
from fedkd.privacy.auditing.rmia import rmia, tune
from fedkd.rng import Rng

ATTACKS = ("lira-online", "lira-offline", "rmia-online", "rmia-offline", "released")


def auc(scores, inside):
    """Share of pairs ordered rightly, ties half, of the canaries that were judged."""
    keep = ~np.isnan(scores)
    into, ranks = inside[keep], rankdata(scores[keep])
    count = into.sum()
    return (ranks[into].mean() - (count + 1) / 2) / (keep.sum() - count)


def chance(value, inside):
    """Whether an AUC is within three standard errors of 1/2, of the Mann-Whitney test."""
    one, two = inside.sum(), (~inside).sum()
    return abs(value - 0.5) < 3 * np.sqrt((one + two + 1) / (12 * one * two))


def scene(references, canaries, shift, key=0, population=200):
    """Losses, coins and releases of K reference runs and a target; ``shift`` is what is learned."""
    g = Rng(key).child("scene").numpy()
    inside = g.random((references + 1, canaries)) < 0.5
    difficulty = g.normal(-3, 0.7, canaries)
    scores = difficulty + g.normal(0, 0.3, inside.shape) + shift * inside
    public = g.normal(-3, 0.7, population) + g.normal(0, 0.3, (references + 1, population))
    directions = g.normal(0, 1, (canaries, 3 * canaries)) * shift
    releases = inside @ directions + g.normal(0, 3, (references + 1, 3 * canaries))
    return {
        "coins": inside[0],
        "inside": inside[1:],
        "target": -np.logaddexp(0, -scores[0]),
        "references": -np.logaddexp(0, -scores[1:]),
        "z": -np.logaddexp(0, -public[0]),
        "zs": -np.logaddexp(0, -public[1:]),
        "release": releases[0],
        "releases": releases[1:],
    }


def attack(name, s):
    if name == "released":
        return released(s["release"], s["releases"], s["inside"])
    online = name.endswith("online")
    if name.startswith("rmia"):
        return rmia(s["target"], s["references"], s["inside"], s["z"], s["zs"], online=online)
    return lira(s["target"], s["references"], s["inside"], online=online)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_learned_is_found_and_what_is_not_is_a_coin_flip(name):
    # A release is one for all canaries, so their directions are told apart by many runs only.
    learned = scene(80, 40, 1.0) if name == "released" else scene(12, 300, 1.0)
    nothing = scene(12, 500, 0.0, key=1)
    assert auc(attack(name, learned), learned["coins"]) > 0.8
    assert chance(auc(attack(name, nothing), nothing["coins"]), nothing["coins"])


@pytest.mark.parametrize("name", ATTACKS)
def test_the_order_of_canaries_and_of_references_does_not_matter(name):
    s = scene(6, 60, 0.5)
    canaries, runs = Rng(1).numpy().permutation(60), Rng(2).numpy().permutation(6)
    mixed = {**s, "target": s["target"][canaries], "releases": s["releases"][runs]}
    mixed["references"] = s["references"][runs][:, canaries]
    mixed["inside"] = s["inside"][runs][:, canaries]
    mixed["zs"] = s["zs"][runs]
    np.testing.assert_allclose(attack(name, mixed), attack(name, s)[canaries], rtol=1e-9)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_canary_that_references_cannot_judge_is_nan_and_usable_says_so(name):
    s = scene(4, 200, 0.8, key=3)
    judged = usable(s["inside"], online=not name.endswith("offline"))
    assert 0.7 < judged.mean() < 1
    scores = attack(name, s)
    assert (np.isnan(scores) == ~judged).all()
    assert np.isfinite(scores[judged]).all()


@pytest.mark.parametrize("name", ["lira-online", "lira-offline", "rmia-online", "rmia-offline"])
def test_attacks_never_see_the_coins_of_the_target(name):
    function = lira if name.startswith("lira") else rmia
    assert "coins" not in inspect.signature(function).parameters
    # Higher is more likely in, for every canary on its own.
    s = scene(8, 100, 0.8)
    raised = {**s, "target": s["target"] * 0.5}
    more = attack(name, raised) - attack(name, s)
    assert (more[~np.isnan(more)] > 0).all()


def test_one_reference_is_enough_offline_and_online_says_what_it_needs():
    s = scene(1, 400, 1.5)
    for name in ("rmia-offline", "lira-offline"):
        scores = attack(name, s)
        assert np.isnan(scores).sum() == s["inside"].sum()
        assert auc(scores, s["coins"]) > 0.65
    for name in ("rmia-online", "lira-online"):
        with pytest.raises(ConfigError, match=r"1 reference runs judge none.*reference_models = 8"):
            attack(name, s)


def test_references_without_any_canary_are_offline_references_of_all():
    s = scene(2, 300, 1.5)
    never = np.zeros_like(s["inside"])
    plain = s["references"][:, :]
    assert np.isfinite(rmia(s["target"], plain, never, s["z"], s["zs"], online=False)).all()
    with pytest.raises(ConfigError, match="judge none"):
        lira(s["target"], plain, ~never, online=False)


def test_a_canarys_own_variance_needs_two_runs_of_a_side():
    s = scene(5, 300, 0.8)
    common = lira(s["target"], s["references"], s["inside"], online=True)
    own = lira(s["target"], s["references"], s["inside"], online=True, fixed_variance=False)
    twice = usable(s["inside"], least=2)
    assert (np.isnan(own) == ~twice).all() and twice.sum() < usable(s["inside"]).sum()
    # With five references of equal noise, variances of each canary's own are worse.
    assert auc(own[twice], s["coins"][twice]) < auc(common[twice], s["coins"][twice])


def test_64_references_are_where_each_canary_gets_its_own_variance():
    for references, fixed in ((63, True), (64, False)):
        s = scene(references, 20, 0.8)
        args = (s["target"], s["references"], s["inside"])
        chosen = lira(*args, online=True, fixed_variance=fixed)
        assert (lira(*args, online=True) == chosen).all()


def test_scores_far_from_every_reference_stay_apart():
    s = scene(8, 50, 0.5)
    far = s["references"].max() + np.linspace(50, 60, 50)
    for online in (True, False):
        scores = lira(far, s["references"], s["inside"], online=online)
        assert len(np.unique(scores[~np.isnan(scores)])) == (~np.isnan(scores)).sum()


def test_canaries_that_beat_the_whole_population_are_still_ordered():
    s = scene(6, 80, 1.0)
    certain = np.linspace(-1e-3, -1e-9, 80)
    unlikely = np.full_like(s["references"], -30.0)
    args = (certain, unlikely, s["inside"], s["z"], s["zs"])
    scores = rmia(*args, online=False, a=1.0)
    judged = ~np.isnan(scores)
    assert (np.floor(scores[judged] * 201) == 200).all()
    assert (np.diff(scores[judged]) > 0).all() and scores[judged].max() < 1


def test_gamma_moves_shares_but_not_the_order():
    s = scene(6, 80, 1.0)
    args = (s["target"], s["references"], s["inside"], s["z"], s["zs"])
    one, two = (rmia(*args, online=True, gamma=g) for g in (1.0, 2.0))
    keep = ~np.isnan(one)
    assert (np.argsort(one[keep]) == np.argsort(two[keep])).all()
    assert (one[keep] >= two[keep]).all() and one[keep].mean() > two[keep].mean() + 0.1


def test_the_offline_scale_is_found_on_references_alone(monkeypatch):
    s = scene(6, 400, 1.0)
    found = tune(s["references"], s["inside"])
    assert found in rmia_module.GRID
    args = (s["target"], s["references"], s["inside"], s["z"], s["zs"])
    given = rmia(*args, online=False, a=found)
    assert np.array_equal(rmia(*args, online=False), given, equal_nan=True)
    # Whole sequences have probabilities that any constant would hide: only a = 1 compares them.
    assert tune(s["references"] * 20 - 100, s["inside"]) == 1.0
    assert tune(s["references"][:1], s["inside"][:1]) == 0.3
    assert tune(s["references"], np.zeros_like(s["inside"])) == 0.3


def test_releases_need_three_runs_and_ignore_what_never_moves():
    s = scene(6, 60, 0.5)
    for few in (1, 2):
        with pytest.raises(ConfigError, match=r"at least 3 reference runs"):
            released(s["release"], s["releases"][:few], s["inside"][:few])
    with pytest.raises(ConfigError, match="judge none"):
        released(s["release"], s["releases"], np.ones_like(s["inside"]))
    fixed = np.hstack([s["releases"], np.full((6, 3), 1e9)])
    again = released(np.append(s["release"], [1e9, -1e9, 5.0]), fixed, s["inside"])
    np.testing.assert_allclose(again, attack("released", s), rtol=1e-9)
    with pytest.raises(DataError, match="same arrays"):
        released(s["release"], np.repeat(s["releases"][:1], 6, axis=0), s["inside"])


def test_releases_of_any_scale_place_and_length_give_the_same_scores(monkeypatch):
    s = scene(6, 60, 0.5)
    scores = attack("released", s)
    moved = released(7 * s["release"] + 3, 7 * s["releases"] + 3, s["inside"])
    np.testing.assert_allclose(moved, scores, rtol=1e-8)
    monkeypatch.setattr("fedkd.privacy.auditing.released.BLOCK", 17)
    np.testing.assert_allclose(attack("released", s), scores, rtol=1e-9)


def test_a_canary_that_moves_nothing_is_neither_in_nor_out():
    inside = np.array([[1, 1], [1, 0], [0, 1], [0, 0]], dtype=bool)
    releases = np.array([[1.0], [1.2], [0.1], [-0.1]])
    first, second = released(np.array([1.0]), releases, inside)
    assert first > 1
    assert second == 0


def test_confidences_are_log_odds_and_logits_do_as_well():
    g = Rng(5).numpy()
    logits, labels = g.normal(0, 4, (30, 5)), g.integers(5, size=30)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    own = p[np.arange(30), labels]
    np.testing.assert_allclose(phi(np.log(p), labels), np.log(own / (1 - own)), rtol=1e-8)
    np.testing.assert_allclose(phi(logits, labels), phi(np.log(p), labels), rtol=1e-9)
    # No rounding where p_y is 1 to all digits.
    assert phi([[0.0, -800.0]], [0]) == 800


@pytest.mark.parametrize(
    ("logs", "labels", "match"),
    [
        ([[0.0]], [0], "at least 2 classes"),
        ([[0.0, 0.0]], [2], "do not fit 2 classes"),
        ([[0.0, 0.0]], [0, 1], "not \\(1, 2\\) and \\(2,\\)"),
        ([[0.0, -np.inf]], [0], "other labels hold -inf"),
        ([[np.nan, 0.0]], [0], "nan at \\(0,\\)"),
    ],
)
def test_confidences_refuse_what_has_none(logs, labels, match):
    with pytest.raises(DataError, match=match):
        phi(logs, labels)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_not_finite_or_does_not_fit_is_refused(name):
    s = scene(4, 30, 0.5)
    keys = ("release", "releases") if name == "released" else ("target", "references")
    for key in keys:
        bad = s[key].copy()
        bad.flat[7] = np.nan
        with pytest.raises(DataError, match="nan at"):
            attack(name, {**s, key: bad})
    with pytest.raises(DataError, match="coins"):
        attack(name, {**s, "inside": s["inside"][:3]})
    with pytest.raises(DataError, match="true or false"):
        attack(name, {**s, "inside": s["inside"].astype(int)})


def test_bad_numbers_of_rmia_are_refused():
    s = scene(4, 30, 0.5)
    args = (s["target"], s["references"], s["inside"], s["z"], s["zs"])
    for bad in ({"gamma": 0.0}, {"gamma": np.inf}, {"a": 1.1}, {"a": -0.1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            rmia(*args, online=False, **bad)
    with pytest.raises(DataError, match="above 0"):
        rmia(np.exp(s["target"]), *args[1:], online=False)
    with pytest.raises(DataError, match="4 references score canaries, but 2"):
        rmia(*args[:4], s["zs"][:2], online=False)


def test_references_that_are_one_model_are_refused():
    s = scene(4, 30, 0.5)
    same = np.repeat(s["references"][:1], 4, axis=0)
    for online in (True, False):
        with pytest.raises(DataError, match="one and the same model"):
            lira(s["target"], same, s["inside"], online=online)
