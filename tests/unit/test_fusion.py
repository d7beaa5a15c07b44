"""Fusion of soft labels against a naive loop over clients, classes and points."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkd.distill.fusion import ClassTable, class_means, fuse_classes, lessons, over_points
from fedkd.rng import Rng


def tables(seed, clients, classes):
    """Draw clients that hold some of the classes, none and all included."""
    g = Rng(seed).numpy()
    made = {}
    for k in range(clients):
        labels = np.flatnonzero(g.random(classes) < 0.5).astype(np.int32)
        probs = g.dirichlet(np.ones(classes), len(labels)).astype(np.float32)
        counts = g.integers(1, 9, len(labels)).astype(np.int32)
        made[k] = ClassTable(labels, probs.reshape(-1, classes), counts)
    return made


def naive(made, c, without=None, by_examples=False):
    """Return the mean of what clients say about class c, or None where nobody holds it."""
    total, mass = 0.0, 0.0
    for k, table in made.items():
        if k == without:
            continue
        for label, p, n in zip(table.labels, table.probs, table.counts, strict=True):
            if label == c:
                w = float(n) if by_examples else 1.0
                total, mass = total + w * p.astype(np.float64), mass + w
    return total / mass if mass else None


cases = given(
    seed=st.integers(0, 10**6), clients=st.integers(1, 5), weighting=st.sampled_from(["u", "e"])
)


@cases
def test_fuse_classes_against_the_naive_loop(seed, clients, weighting):
    made, by_examples = tables(seed, clients, 4), weighting == "e"
    name = "examples" if by_examples else "uniform"
    for without in (None, 0):
        fused, mask = fuse_classes(made, 4, leave_out=without, weighting=name)
        for c in range(4):
            expected = naive(made, c, without, by_examples)
            assert mask[c] == (expected is not None)
            if mask[c]:
                assert np.allclose(fused[c], expected, atol=1e-6)
                assert fused[c].sum() == pytest.approx(1.0, abs=1e-5)


@given(seed=st.integers(0, 10**6), share=st.sampled_from(["mean", "leave_one_out", "own"]))
def test_lessons_against_the_naive_loop(seed, share):
    made = tables(seed, 4, 4)
    taught = lessons(made, 4, share, "uniform")
    for k, own in made.items():
        without = k if share == "leave_one_out" else None
        source = {k: own} if share == "own" else made
        expected = {int(c): naive(source, c, without) for c in own.labels}
        expected = {c: p for c, p in expected.items() if p is not None}
        assert taught[k].labels.tolist() == sorted(expected)
        for c, p in zip(taught[k].labels, taught[k].probs, strict=True):
            assert np.allclose(p, expected[int(c)], atol=1e-6)


@given(seed=st.integers(0, 10**6))
def test_leave_one_out_never_contains_ones_own(seed):
    made = tables(seed, 3, 4)
    before = lessons(made, 4, "leave_one_out", "examples")[1]
    flipped = ClassTable(made[1].labels, made[1].probs[:, ::-1].copy(), made[1].counts + 5)
    after = lessons({**made, 1: flipped}, 4, "leave_one_out", "examples")[1]
    assert after.labels.tobytes() == before.labels.tobytes()
    assert after.probs.tobytes() == before.probs.tobytes()


def test_a_class_that_only_one_client_holds_is_no_lesson_for_it():
    one = ClassTable(np.int32([0, 2]), np.float32([[1, 0, 0], [0, 0, 1]]), np.int32([5, 5]))
    two = ClassTable(np.int32([0]), np.float32([[0.6, 0.4, 0]]), np.int32([1]))
    taught = lessons({3: one, 5: two}, 3, "leave_one_out", "uniform")
    assert taught[3].labels.tolist() == [0]
    assert taught[3].probs.tolist() == two.probs.tolist()
    assert taught[5].probs.tolist() == [[1, 0, 0]]


def test_newcomers_get_the_mean_of_everybody_but_never_under_own():
    made = tables(3, 3, 4)
    for share in ("mean", "leave_one_out"):
        newcomer = lessons(made, 4, share, "uniform")[-1]
        known = [c for c in range(4) if naive(made, c) is not None]
        assert newcomer.labels.tolist() == known
        for c, p in zip(newcomer.labels, newcomer.probs, strict=True):
            assert np.allclose(p, naive(made, c), atol=1e-6)
    assert -1 not in lessons(made, 4, "own", "uniform")


@given(seed=st.integers(0, 10**6))
def test_order_of_clients_changes_no_bit(seed):
    made = tables(seed, 5, 4)
    backwards = dict(reversed(made.items()))
    for share in ("mean", "leave_one_out", "own"):
        a, b = (lessons(t, 4, share, "examples") for t in (made, backwards))
        assert a.keys() == b.keys()
        for k in a:
            assert a[k].probs.tobytes() == b[k].probs.tobytes()
            assert a[k].labels.tobytes() == b[k].labels.tobytes()


def test_over_points_is_the_mean_over_the_points_that_know_a_class():
    a = ClassTable(np.int32([0, 1]), np.float32([[1, 0, 0], [0, 1, 0]]), np.int32([9, 9]))
    b = ClassTable(np.int32([1, 2]), np.float32([[0, 0, 1], [0.5, 0.5, 0]]), np.int32([1, 1]))
    mean = over_points([a, b])
    assert mean.labels.tolist() == [0, 1, 2]
    assert mean.probs.tolist() == [[1, 0, 0], [0, 0.5, 0.5], [0.5, 0.5, 0]]


@given(seed=st.integers(0, 10**6), n=st.integers(1, 30))
def test_class_means_against_masks(seed, n):
    g = Rng(seed).numpy()
    values, y = g.normal(size=(n, 3)).astype(np.float32), g.integers(0, 5, n)
    labels, means, counts = class_means(values, y)
    assert labels.tolist() == sorted(set(y.tolist()))
    assert counts.sum() == n
    assert (labels.dtype, means.dtype, counts.dtype) == (np.int32, np.float32, np.int32)
    for label, mean, count in zip(labels, means, counts, strict=True):
        assert count == (y == label).sum()
        assert np.allclose(mean, values[y == label].mean(0), atol=1e-6)
