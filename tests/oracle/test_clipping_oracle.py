"""Clipping against a naive loop, and a search for clients that move the sum by too much."""

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedkd.privacy.options import Clipping
from fedkd.privacy.payload import Weights
from fedkd.privacy.weights import clipped, weights_coder

MODES = ["flat", "per-layer", "adaptive"]
SHAPES = {"model/a": (3,), "model/b": (2, 2), "model/c": ()}
FLOAT64 = st.floats(allow_nan=False, allow_infinity=False)
NASTY = st.sampled_from([0.0, -0.0, 5e-324, -2.2e-308, 1e-200, 1.0, 1e154, -1e200, 1.7e308])
NORMS = st.sampled_from([1e-30, 1e-3, 1.0, 7.5, 1e30, 1e300])


def arrays_of(values):
    """A whole set of float64 arrays made of drawn values."""
    made = {}
    for key, shape in SHAPES.items():
        size = math.prod(shape)
        made[key], values = np.reshape(np.array(values[:size]), shape), values[size:]
    return made


UPLOADS = st.lists(FLOAT64 | NASTY, min_size=8, max_size=8).map(arrays_of)
SPARSE = st.tuples(UPLOADS, st.sets(st.sampled_from(sorted(SHAPES)))).map(
    lambda drawn: {k: v for k, v in drawn[0].items() if k not in drawn[1]}
)


def coder_of(mode, norm, reference):
    return weights_coder(Weights(reference), Clipping(mode=mode, norm=norm), norm)


def naive(upload, reference, mode, norm):
    """Clip by the book, one number at a time."""
    pieces = []
    for key in sorted(reference):
        value = upload.get(key, reference[key])
        pieces.append(
            [
                float(x) - float(r)
                for x, r in zip(np.ravel(value), np.ravel(reference[key]), strict=True)
            ]
        )
    if mode == "per-layer":
        limits = [norm / math.sqrt(len(pieces))] * len(pieces)
    else:
        pieces, limits = [[x for piece in pieces for x in piece]], [norm]
    out = []
    for piece, limit in zip(pieces, limits, strict=True):
        length = math.hypot(*piece)
        out += [x * min(1.0, limit / length) if length else 0.0 for x in piece]
    return out


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**32), scale=st.sampled_from([1e-3, 0.3, 1.0, 50.0]))
def test_against_the_naive_loop(mode, seed, scale):
    generator = np.random.Generator(np.random.Philox(seed))
    reference, upload = ({k: generator.normal(size=s) for k, s in SHAPES.items()} for _ in range(2))
    upload = {k: reference[k] + scale * v for k, v in upload.items()}
    made = coder_of(mode, 1.5, reference).encode(upload)
    np.testing.assert_allclose(made, naive(upload, reference, mode, 1.5), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("mode", MODES)
@given(upload=SPARSE, reference=UPLOADS, norm=NORMS)
@example(arrays_of([1.7e308] * 8), arrays_of([-1.7e308] * 8), 1.0)
@example(arrays_of([5e-324] * 8), arrays_of([0.0] * 8), 1e-30)
@example(arrays_of([1e200] * 8), arrays_of([0.0] * 8), 1e300)
def test_no_finite_upload_is_longer_than_the_bound(mode, upload, reference, norm):
    coder = coder_of(mode, norm, reference)
    made = coder.encode(upload)
    assert made.dtype == np.float64 and np.isfinite(made).all()
    assert coder.bound == norm
    assert math.hypot(*made) <= norm * (1 + 1e-12)


@pytest.mark.parametrize("mode", MODES)
@given(
    cohort=st.lists(SPARSE, max_size=4),
    one=SPARSE,
    other=SPARSE,
    reference=UPLOADS,
    norm=st.sampled_from([1e-3, 1.0, 7.5]),
)
def test_neighbouring_cohorts_differ_by_no_more_than_the_bound(
    mode, cohort, one, other, reference, norm
):
    coder = coder_of(mode, norm, reference)

    def total(uploads):
        return sum((coder.encode(u) for u in uploads), start=coder.encode({}))

    slack = 1 + 1e-9
    without = total(cohort)
    assert math.hypot(*(total([*cohort, one]) - without)) <= norm * slack
    assert math.hypot(*(total([*cohort, one]) - total([*cohort, {}]))) <= norm * slack
    assert math.hypot(*(total([*cohort, one]) - total([*cohort, other]))) <= 2 * norm * slack

    def count(uploads):
        return sum(coder.vote(u) for u in uploads)

    assert abs(count([*cohort, one]) - count(cohort)) <= 0.5
    assert abs(count([*cohort, one]) - count([*cohort, {}])) <= 0.5


@pytest.mark.parametrize("mode", MODES)
def test_the_bound_is_reached_so_it_is_not_larger_than_need_be(mode):
    reference = {k: np.zeros(s) for k, s in SHAPES.items()}
    long = {k: np.full(s, 100.0) for k, s in SHAPES.items()}
    coder = coder_of(mode, 2.0, reference)
    made = coder.encode(long)
    assert math.hypot(*made) == pytest.approx(2.0, rel=1e-12)
    opposite = coder.encode({k: -v for k, v in long.items()})
    assert math.hypot(*(made - opposite)) == pytest.approx(4.0, rel=1e-12), "replace-one: twice"


@given(
    values=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6),
    limit=st.floats(1e-3, 1e3),
)
def test_clipping_keeps_the_direction_and_what_is_short(values, limit):
    vector = np.array(values)
    made = clipped(vector, limit)
    length = math.hypot(*vector)
    if length <= limit * (1 - 1e-12):
        assert made.tobytes() == vector.tobytes()
    elif length > limit * (1 + 1e-12):
        np.testing.assert_allclose(made, vector / length * limit, rtol=1e-12, atol=1e-300)
