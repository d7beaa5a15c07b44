"""What every registered objective promises, and what each one is."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkd.distill.objectives.base import objectives
from fedkd.distill.objectives.kl import KullbackLeibler, ReverseKullbackLeibler
from fedkd.distill.objectives.soft_ce import SoftCrossEntropy
from fedkd.rng import Rng

every = pytest.mark.parametrize("name", objectives.names())
DIVERGENCES = [KullbackLeibler(), ReverseKullbackLeibler()]


def logits(n=6, classes=5, seed=0, scale=2.0):
    return scale * torch.randn(n, classes, generator=Rng(seed).torch(), dtype=torch.float64)


def soft(z, temperature=1.0):
    return torch.softmax(z / temperature, 1)


@every
def test_one_finite_value_for_each_example_in_any_order(name):
    objective = objectives.get(name)()
    z, p = logits(), soft(logits(seed=1))
    values = objective(z, p, 2.0)
    assert values.shape == (6,)
    assert torch.isfinite(values).all()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(objective(z[order], p[order], 2.0), values[order])
    assert dataclasses.is_dataclass(objective)
    assert objectives.summary(name).endswith(".")


@every
def test_hard_and_extreme_inputs_stay_finite(name):
    objective = objectives.get(name)()
    z = (torch.eye(4) * 200 - 100).requires_grad_()
    hard = torch.eye(4).roll(1, 0)
    values = objective(z, hard, 1.0)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(z.grad).all()


@every
def test_the_gradient_is_right_and_vanishes_at_the_teacher(name):
    objective = objectives.get(name)()
    p = soft(logits(seed=1), 3.0)
    z = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: objective(z, p, 3.0), (z,))
    at = (3.0 * p.log() + 7.0).requires_grad_()
    objective(at, p, 3.0).sum().backward()
    assert at.grad.abs().max() < 1e-10


@every
def test_shifting_all_logits_changes_nothing(name):
    objective = objectives.get(name)()
    p = soft(logits(seed=1))
    assert torch.allclose(objective(logits(), p, 2.0), objective(logits() + 5.0, p, 2.0))


@every
def test_the_gradient_keeps_its_size_at_high_temperature(name):
    """With the factor T^2 the gradient tends to (z - v) / C for centred z, v; without it to 0."""
    objective = objectives.get(name)()
    v = logits(seed=1)
    v = v - v.mean(1, keepdim=True)
    for temperature in (100.0, 1000.0):
        z = logits()
        z = (z - z.mean(1, keepdim=True)).requires_grad_()
        objective(z, soft(v, temperature), temperature).sum().backward()
        expected = (z.detach() - v) / 5
        assert torch.allclose(z.grad, expected, atol=20 / temperature)


@pytest.mark.parametrize("objective", DIVERGENCES, ids=lambda o: type(o).__name__)
@given(seed=st.integers(0, 10**6), temperature=st.floats(0.5, 10))
def test_kl_is_positive_and_zero_only_at_equality(objective, seed, temperature):
    z, p = logits(seed=seed), soft(logits(seed=seed + 1), temperature)
    assert (objective(z, p, temperature) > 1e-9).all()
    same = objective(temperature * p.log(), p, temperature)
    assert same.abs().max() < 1e-9


def test_kl_is_not_symmetric_and_reverse_swaps_the_roles():
    p, q = soft(logits(seed=1)), soft(logits())
    forward = KullbackLeibler()(q.log(), p, 1.0)
    backward = ReverseKullbackLeibler()(p.log(), q, 1.0)
    assert torch.allclose(forward, backward)
    assert not torch.allclose(forward, KullbackLeibler()(p.log(), q, 1.0))


def test_soft_cross_entropy_is_kl_plus_the_teachers_entropy():
    z, p, t = logits(), soft(logits(seed=1), 2.0), 2.0
    entropy = -(p * p.log()).sum(1) * t**2
    assert torch.allclose(SoftCrossEntropy()(z, p, t), KullbackLeibler()(z, p, t) + entropy)


def test_soft_cross_entropy_of_one_hot_targets_is_cross_entropy():
    z, y = logits(), torch.tensor([0, 1, 2, 3, 4, 0])
    hard = torch.eye(5, dtype=torch.float64)[y]
    expected = torch.nn.functional.cross_entropy(z, y, reduction="none")
    assert torch.allclose(SoftCrossEntropy()(z, hard, 1.0), expected)
