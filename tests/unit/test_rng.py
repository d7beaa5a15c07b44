"""Addressed randomness: equal addresses equal numbers, other addresses independent ones."""

import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkd.rng import Rng, stream

parts = st.lists(st.one_of(st.text(max_size=5), st.integers(0, 10**6)), max_size=4).map(tuple)


@given(seed=st.integers(0, 10**9), path=parts)
def test_equal_addresses_give_equal_numbers(seed, path):
    one, other = Rng(seed, path), stream(seed, *path)
    assert one == other
    assert one.numpy().random(3).tobytes() == other.numpy().random(3).tobytes()
    assert torch.equal(torch.rand(3, generator=one.torch()), torch.rand(3, generator=other.torch()))
    assert one.child("a", 1) == Rng(seed, (*path, "a", 1)) == one.child("a").child(1)


@given(a=st.tuples(st.integers(0, 99), parts), b=st.tuples(st.integers(0, 99), parts))
def test_other_addresses_give_other_keys(a, b):
    same = a[0] == b[0] and [(type(p), p) for p in a[1]] == [(type(p), p) for p in b[1]]
    assert (Rng(*a).key == Rng(*b).key) == same


def test_addresses_cannot_be_confused():
    pairs = [
        (("ab", "c"), ("a", "bc")),
        (("a/s1:b",), ("a", "b")),
        ((1, 23), (12, 3)),
        (("1",), (1,)),
        ((), ("",)),
    ]
    for one, other in pairs:
        assert Rng(0, one).key != Rng(0, other).key
    assert Rng(1, ()).key != Rng(0, (1,)).key


def test_numpy_integers_address_the_same_stream():
    assert Rng(0, ("x", np.int64(7))).key == Rng(0, ("x", 7)).key


def test_nothing_global_is_read_or_moved():
    states = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    first = Rng(0, ("a",)).uniform()
    random.seed(1)
    torch.manual_seed(1)
    assert Rng(0, ("a",)).uniform() == first
    random.setstate(states[0])
    torch.set_rng_state(states[2])
    Rng(0).numpy().random(10)
    torch.rand(10, generator=Rng(0).torch())
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_neighbouring_streams_look_independent():
    draws = np.array(
        [stream(s, "u", r, k).uniform() for s in range(3) for r in range(20) for k in range(50)]
    )
    assert abs(draws.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.05
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert ((counts - 300) ** 2 / 300).sum() < 30, "chi-square with 9 degrees of freedom"
