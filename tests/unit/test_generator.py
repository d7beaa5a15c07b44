"""Generators: shapes for any task, values within bounds, numbers from the address alone."""

import numpy as np
import pytest
import torch

from fedkd.distill.generator import (
    Bounded,
    Codes,
    draw_labels,
    draw_noise,
    driven,
    feature_generator,
    filled,
    input_generator,
)
from fedkd.models.book import to_arrays
from fedkd.rng import stream
from fedkd.types import Task

NOISE, CLASSES = 5, 3
RNG = stream(0, "generator")


def task(shape, bounds=(-1.0, 2.0)):
    return Task(name="made", input_shape=shape, classes=CLASSES, bounds=bounds)


def made(shape, rng=RNG, width=4, bounds=(-1.0, 2.0), weights=None):
    with torch.device("meta"):
        generator = input_generator(NOISE, task(shape, bounds), width)
    return filled(generator.to_empty(device="cpu"), rng, weights)


def coded(n=7, learned=False):
    labels = torch.arange(n) % CLASSES
    return Codes(draw_noise(n, NOISE, RNG.child("noise")), labels, CLASSES, learned=learned)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 28, 28),
        (3, 32, 32),
        (1, 8, 8),
        (3, 7, 5),
        (2, 13, 30),
        (1, 3, 2),
        (1, 1, 1),
        (4, 1, 9),
        (6,),
        (1,),
        (4, 9),
    ],
)
def test_a_sample_is_an_input_of_the_task_within_its_bounds(shape):
    generator = made(shape)
    x = generator(coded()(torch.arange(7))).detach()
    assert x.shape == (7, *shape)
    assert x.dtype == torch.float32
    assert float(x.min()) >= -1.0
    assert float(x.max()) <= 2.0
    assert len(torch.unique(x, dim=0)) == 7, "codes that differ make other samples"


def test_bounds_are_reached_and_never_left():
    u = torch.tensor([-1e9, -2.0, 0.0, 2.0, 1e9])
    x = Bounded(-0.5, 4.0)(u)
    assert x[0] == -0.5
    assert x[4] == 4.0
    np.testing.assert_allclose(x[2], 1.75)
    np.testing.assert_allclose(x[1:4], -0.5 + 4.5 / (1 + np.exp(-u[1:4].numpy())), atol=1e-6)
    heated = made((1, 8, 8), bounds=(0.25, 0.75))
    with torch.no_grad():
        for p in heated.parameters():
            p.mul_(1e4)
    x = heated(coded()(torch.arange(7))).detach()
    assert 0.25 <= float(x.min()) <= float(x.max()) <= 0.75


@pytest.mark.parametrize("shape", [(1, 9, 8), (6,)])
def test_the_label_changes_the_sample_and_so_does_the_noise(shape):
    generator = made(shape)
    noise = draw_noise(1, NOISE, RNG.child("noise")).expand(2, -1)
    by_label = generator(Codes(noise, torch.tensor([0, 1]), CLASSES)(torch.arange(2)))
    assert not torch.allclose(by_label[0], by_label[1])
    two = draw_noise(2, NOISE, RNG.child("noise"))
    by_noise = generator(Codes(two, torch.tensor([1, 1]), CLASSES)(torch.arange(2)))
    assert not torch.allclose(by_noise[0], by_noise[1])


def test_a_feature_generator_makes_features():
    generator = filled(feature_generator(NOISE, CLASSES, 11, 6), RNG)
    assert generator(coded()(torch.arange(7))).shape == (7, 11)


def test_a_sample_does_not_depend_on_the_batch_it_is_made_in():
    generator, codes = made((1, 7, 5)), coded()
    generator.train()
    together = generator(codes(torch.arange(7)))
    alone = torch.cat([generator(codes(torch.tensor([i]))) for i in range(7)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_numbers_come_from_the_address_alone():
    before = torch.get_rng_state()
    one, again = to_arrays(made((1, 8, 8))), to_arrays(made((1, 8, 8)))
    other = to_arrays(made((1, 8, 8), RNG.child("other")))
    assert {k: v.tobytes() for k, v in one.items()} == {k: v.tobytes() for k, v in again.items()}
    drawn = [k for k, v in one.items() if len(np.unique(v)) > 1]
    assert all(one[k].tobytes() != other[k].tobytes() for k in drawn)
    assert len(drawn) >= 6
    weights = torch.ones(CLASSES)
    for draw in (lambda r: draw_labels(50, weights, r), lambda r: draw_noise(50, NOISE, r)):
        assert torch.equal(draw(RNG), draw(RNG))
        assert not torch.equal(draw(RNG), draw(RNG.child("other")))
    assert torch.equal(torch.get_rng_state(), before)


def test_given_weights_are_taken_and_missing_ones_drawn():
    one = to_arrays(made((1, 8, 8)))
    kept = {"head.0.weight": one["head.0.weight"] + 1}
    found = to_arrays(made((1, 8, 8), weights=kept))
    assert found["head.0.weight"].tobytes() == kept["head.0.weight"].tobytes()
    assert found["seed.0.0.weight"].tobytes() == one["seed.0.0.weight"].tobytes()


def test_labels_of_weight_zero_are_never_drawn():
    weights = torch.tensor([0.0, 3.0, 0.0, 1.0, 0.0])
    found = np.bincount(draw_labels(200_000, weights, RNG).numpy(), minlength=5)
    assert found[[0, 2, 4]].tolist() == [0, 0, 0]
    # Five standard deviations of a binomial share.
    assert abs(found[1] / 200_000 - 0.75) < 5 * np.sqrt(0.75 * 0.25 / 200_000)
    for n in (1, 2, 3):
        few = [int(y) for i in range(200) for y in draw_labels(n, weights, RNG.child(i))]
        assert set(few) <= {1, 3}
    last = torch.tensor([0.1] * 7 + [0.0])
    assert int(draw_labels(200_000, last, RNG).max()) == 6


def test_labels_without_any_weight_are_uniform():
    found = np.bincount(draw_labels(30_000, torch.zeros(3), RNG).numpy(), minlength=3)
    assert abs(found / 30_000 - 1 / 3).max() < 5 * np.sqrt(2 / 9 / 30_000)


def test_noise_is_standard_normal():
    noise = draw_noise(2_000, 50, RNG)
    assert noise.shape == (2_000, 50)
    assert abs(float(noise.mean())) < 5 / np.sqrt(1e5)
    assert abs(float(noise.var()) - 1) < 5 * np.sqrt(2 / 1e5)


@pytest.mark.parametrize("learned", [False, True])
def test_codes_are_trained_only_when_learned(learned):
    codes = coded(learned=learned)
    source = codes.noise.detach().clone()
    network = driven(codes, made((6,)))
    network(torch.arange(7)).sum().backward()
    assert (codes.noise.grad is not None) is learned
    assert network.get_parameter("head.head.0.weight").grad is not None
    row = codes(torch.tensor([4]))[0].detach()
    assert torch.equal(row[:NOISE], source[4])
    assert row[NOISE:].tolist() == [0.0, 1.0, 0.0], "noise, then the label one-hot"


def test_codes_are_a_copy_of_the_noise():
    noise = torch.zeros(2, NOISE)
    codes = Codes(noise, torch.tensor([0, 1]), CLASSES, learned=True)
    with torch.no_grad():
        codes.noise.add_(1)
    assert float(noise.sum()) == 0
