"""Exact sensitivity of clipped softmax against brute force, published figures and search."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from fedkd.errors import ConfigError
from fedkd.privacy.sensitivity import (
    clip_log_probs,
    clip_logits,
    diameter,
    project_to_simplex,
    radius,
    softmax,
)
from fedkd.rng import Rng

C = 5.0
DIAMETERS = {
    (2, 1): 1.41409,
    (2, 2): 1.39528,
    (2, 4): 1.19965,
    (2, 10): 0.65353,
    (2, 20): 0.34637,
    (10, 1): 1.41357,
    (10, 2): 1.32437,
    (10, 4): 0.74658,
    (10, 10): 0.29227,
    (10, 20): 0.15490,
    (100, 1): 1.40782,
    (100, 4): 0.23646,
    (100, 20): 0.04898,
}
RADII = {
    10: [0.9483, 0.8884, 0.5008, 0.1643, 0.0798],
    100: [0.9905, 0.5928, 0.1601, 0.0521, 0.0253],
}


def corners(classes, clip):
    return np.array(list(itertools.product([-clip, clip], repeat=classes)))


@pytest.mark.parametrize(("classes", "t"), DIAMETERS)
def test_the_diameter_is_the_tabulated_one(classes, t):
    assert diameter(classes, C, float(t)) == pytest.approx(DIAMETERS[classes, t], abs=6e-6)


@pytest.mark.parametrize("classes", RADII)
def test_the_radius_is_the_tabulated_one(classes):
    found = radius(classes, C, np.array([1.0, 2.0, 4.0, 10.0, 20.0]))
    assert found == pytest.approx(RADII[classes], abs=6e-5)


@pytest.mark.parametrize("classes", [2, 3, 5, 7])
@pytest.mark.parametrize("clip", [0.5, 5.0])
@pytest.mark.parametrize("t", [0.3, 1.0, 3.0, 10.0, 40.0])
def test_brute_force_over_all_corners_agrees(classes, clip, t):
    p = softmax(corners(classes, clip), t)
    distances = np.linalg.norm(p[:, None] - p[None], axis=2)
    assert diameter(classes, clip, t) == pytest.approx(distances.max(), rel=1e-12)
    reach = np.linalg.norm(p - 1 / classes, axis=1).max()
    assert radius(classes, clip, t) == pytest.approx(reach, rel=1e-12)


def test_the_one_hot_formula_is_too_small_for_hot_rows():
    r = np.exp(2 * C / 10.0)
    one_hot = np.sqrt(2) * (r - 1) / (r + 10 - 1)
    p = softmax(np.array([[C] * 5 + [-C] * 5, [-C] * 5 + [C] * 5]), 10.0)
    assert one_hot == pytest.approx(0.2074, abs=1e-4)
    assert np.linalg.norm(p[0] - p[1]) > 1.4 * one_hot
    assert diameter(10, C, 10.0) >= np.linalg.norm(p[0] - p[1])


@pytest.mark.parametrize("classes", [2, 4, 10])
@pytest.mark.parametrize("t", [0.5, 1.0, 4.0, 20.0])
def test_no_pair_of_inputs_beats_the_bound_and_search_comes_close(classes, t):
    rng = Rng(0).child("attack", classes, int(10 * t)).numpy()
    scale = np.exp(rng.uniform(-3, 4, (4000, 1)))
    high = rng.random((4000, classes)) < rng.random((4000, 1))
    p = softmax(clip_logits(scale * (high + 0.2 * rng.normal(size=(4000, classes))), C), t)
    far = np.linalg.norm(p[:2000] - p[2000:], axis=1).max()
    assert far <= diameter(classes, C, t) * (1 + 1e-12)
    reach = np.linalg.norm(p - 1 / classes, axis=1).max()
    assert reach <= radius(classes, C, t) * (1 + 1e-12)
    assert reach > 0.8 * radius(classes, C, t)


@pytest.mark.parametrize("t", [1.0, 10.0])
def test_local_ascent_from_the_interior_ends_at_the_bound(t):
    k, best, reach = 5, diameter(5, C, t), 0.0
    for start in range(5):
        z = Rng(start).child("start").numpy().uniform(-C, C, 2 * k)
        found = minimize(
            lambda v: -np.sum((softmax(v[:k], t) - softmax(v[k:], t)) ** 2),
            z,
            bounds=[(-C, C)] * (2 * k),
        )
        reach = max(reach, np.sqrt(-found.fun))
    assert reach <= best * (1 + 1e-9)
    assert reach > 0.8 * best


@pytest.mark.parametrize("classes", [3, 10])
def test_logits_centred_by_their_mean_reach_every_corner(classes):
    """Centring first does not make the sensitivity smaller: the bound is tight."""
    rows = []
    for s in range(1, classes):
        z = np.array([C * classes / s] * s + [-C * classes / (classes - s)] * (classes - s))
        clipped = clip_logits(z, C)
        assert clipped.tolist() == [C] * s + [-C] * (classes - s)
        rows.append(softmax(clipped, 7.0))
    reach = np.linalg.norm(np.array(rows) - 1 / classes, axis=1).max()
    assert reach == pytest.approx(radius(classes, C, 7.0), rel=1e-12)


def test_limits_of_cold_and_hot():
    assert diameter(10, C, 1e-6) == pytest.approx(np.sqrt(2))
    assert radius(10, C, 1e-6) == pytest.approx(np.sqrt(0.9))
    # Subtracting two nearly equal probabilities would lose all digits here.
    hot = [radius(10, C, 1e9) * 1e9, radius(10, C, 1e7) * 1e7]
    assert hot[0] == pytest.approx(hot[1], rel=1e-6) and hot[0] > 1
    ratio = diameter(10, C, 1e9) / radius(10, C, 1e9)
    assert ratio == pytest.approx(2.0, rel=1e-6)


def test_arrays_of_temperatures_give_what_single_ones_do():
    t = np.array([[1.0, 4.0, 1.0], [20.0, 0.5, 4.0]])
    for function in (radius, diameter):
        one_by_one = [[function(10, C, float(x)) for x in row] for row in t]
        assert np.array_equal(function(10, C, t), np.array(one_by_one))


@pytest.mark.parametrize(
    ("classes", "clip", "t"),
    [(1, 5.0, 1.0), (3, 0.0, 1.0), (3, np.inf, 1.0), (3, 5.0, 0.0), (3, 5.0, np.nan), (3, 1, 1e15)],
)
def test_what_has_no_sensitivity_is_refused(classes, clip, t):
    for function in (radius, diameter):
        with pytest.raises(ConfigError):
            function(classes, clip, t)


def test_log_probabilities_stay_in_the_same_polytope_and_lose_nothing_inside():
    rng = Rng(3).numpy()
    p = softmax(3 * rng.normal(size=(50, 6)))
    inside = p[p.max(1) / p.min(1) < np.exp(2 * C)]
    assert len(inside) > 20
    np.testing.assert_allclose(softmax(clip_log_probs(inside, C)), inside, rtol=1e-12)
    hard = np.eye(6)
    found = softmax(clip_log_probs(hard, C))
    assert np.linalg.norm(found - 1 / 6, axis=1).max() <= radius(6, C, 1.0) * (1 + 1e-12)


def test_the_projection_is_the_nearest_distribution():
    rows = Rng(1).numpy().normal(size=(6, 5)) * 1.5
    for row, found in zip(rows, project_to_simplex(rows), strict=True):
        best = minimize(
            lambda v, row=row: np.sum((v - row) ** 2),
            np.full(5, 0.2),
            jac=lambda v, row=row: 2 * (v - row),
            bounds=[(0, 1)] * 5,
            constraints={"type": "eq", "fun": lambda v: v.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14},
        )
        assert found == pytest.approx(best.x, abs=1e-6)
        assert found.sum() == pytest.approx(1) and found.min() >= 0


def test_the_projection_leaves_distributions_alone_and_takes_huge_rows():
    p = softmax(Rng(2).numpy().normal(size=(5, 4)))
    np.testing.assert_allclose(project_to_simplex(p), p, rtol=1e-12)
    assert project_to_simplex(np.array([[1e30, -1e30, 0.0]])).tolist() == [[1.0, 0.0, 0.0]]
