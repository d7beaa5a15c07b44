"""Hash codes and the exact search for neighbours, beside plain loops."""

import math

import numpy as np
import pytest

from fedkd.distill import hashing
from fedkd.distill.hashing import hamming, hash_codes, nearest_same_class, random_planes
from fedkd.rng import Rng


def normal(seed, *shape):
    return Rng(seed, ("test",)).numpy().standard_normal(shape)


def bit_strings(codes):
    return ["".join(f"{byte:08b}" for byte in row) for row in codes]


def by_hand(codes, labels, owners, count):
    """The neighbours as a sort over pairs of (distance, position) finds them."""
    texts = bit_strings(codes)
    found = []
    for i in range(len(labels)):
        others = sorted(
            (sum(a != b for a, b in zip(texts[i], texts[j], strict=True)), j)
            for j in range(len(labels))
            if labels[j] == labels[i] and owners[j] != owners[i]
        )
        near = [j for _, j in others[:count]]
        found.append(near + [-1] * (count - len(near)))
    return found


@pytest.mark.parametrize("bits", [1, 7, 8, 12, 64])
def test_a_bit_says_on_which_side_of_its_plane_an_example_lies(bits):
    x, planes = normal(0, 5, 2, 3), random_planes(6, bits, Rng(1))
    codes = hash_codes(x, planes)
    assert codes.dtype == np.uint8
    assert codes.shape == (5, math.ceil(bits / 8))
    expected = [
        "".join("1" if row @ w >= 0 else "0" for w in planes.T).ljust(codes.shape[1] * 8, "0")
        for row in x.reshape(5, 6)
    ]
    assert bit_strings(codes) == expected


def test_equal_addresses_give_equal_planes_and_others_do_not():
    one, same, other = (random_planes(4, 3, Rng(seed)) for seed in (0, 0, 1))
    assert one.tobytes() == same.tobytes()
    assert not np.allclose(one, other)


def test_length_does_not_count_and_opposites_differ_in_every_bit():
    x, planes = normal(2, 6, 10), random_planes(10, 32, Rng(0))
    assert np.array_equal(hash_codes(3 * x, planes), hash_codes(x, planes))
    assert hamming(hash_codes(x, planes), hash_codes(-x, planes)).diagonal().tolist() == [32] * 6


@pytest.mark.parametrize("degrees", [10, 45, 90, 150])
def test_the_share_of_bits_that_differ_is_the_angle_over_pi(degrees):
    bits, angle = 4000, math.radians(degrees)
    x = np.zeros((2, 20))
    x[0, 3], x[1, 3], x[1, 7] = 1.0, math.cos(angle), math.sin(angle)
    codes = hash_codes(x, random_planes(20, bits, Rng(3)))
    share = hamming(codes[:1], codes[1:])[0, 0] / bits
    p = angle / math.pi
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / bits)


def test_distances_are_those_of_the_bits():
    a, b = (hash_codes(normal(s, n, 9), random_planes(9, 21, Rng(0))) for s, n in ((4, 5), (5, 7)))
    expected = [
        [sum(p != q for p, q in zip(s, t, strict=True)) for t in bit_strings(b)]
        for s in bit_strings(a)
    ]
    assert hamming(a, b).tolist() == expected


@pytest.mark.parametrize("bits", [3, 40])
@pytest.mark.parametrize("count", [1, 4, 50])
@pytest.mark.parametrize("chunk", [1, 4, 1024])
def test_neighbours_are_those_of_a_plain_sort(bits, count, chunk, monkeypatch):
    """With 3 bits nearly all distances are tied: the lower position wins."""
    monkeypatch.setattr(hashing, "CHUNK", chunk)
    n = 40
    codes = hash_codes(normal(6, n, 5), random_planes(5, bits, Rng(0)))
    draw = Rng(7).numpy()
    labels, owners = draw.integers(0, 3, n), draw.integers(0, 4, n)
    found = nearest_same_class(codes, labels, owners, count)
    assert found.dtype == np.int32
    assert found.tolist() == by_hand(codes, labels, owners, count)


def test_with_an_owner_each_all_but_oneself_are_searched():
    codes = np.zeros((4, 1), dtype=np.uint8)
    found = nearest_same_class(codes, np.array([0, 0, 1, 0]), np.arange(4), 2)
    assert found.tolist() == [[1, 3], [0, 3], [-1, -1], [0, 1]]


def test_an_example_whose_class_nobody_else_holds_has_no_neighbour():
    codes, labels = np.zeros((4, 1), dtype=np.uint8), np.array([0, 0, 1, 1])
    found = nearest_same_class(codes, labels, np.array([0, 1, 1, 1]), 3)
    assert found.tolist() == [[1, -1, -1], [0, -1, -1], [-1, -1, -1], [-1, -1, -1]]


def test_no_examples_have_no_neighbours():
    codes = hash_codes(np.zeros((0, 2, 2), np.float32), random_planes(4, 9, Rng(0)))
    assert codes.shape == (0, 2)
    assert nearest_same_class(codes, np.zeros(0), np.zeros(0), 3).shape == (0, 3)
