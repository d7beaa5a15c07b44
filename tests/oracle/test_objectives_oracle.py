"""Objectives against torch's and SciPy's own divergences."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch.nn import functional

from fedkd.distill.objectives.kl import KullbackLeibler, ReverseKullbackLeibler
from fedkd.distill.objectives.soft_ce import SoftCrossEntropy
from fedkd.rng import Rng


def case(seed=0, n=7, classes=5):
    g = Rng(seed).torch()
    z, v = (3 * torch.randn(n, classes, generator=g, dtype=torch.float64) for _ in range(2))
    return z, v


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0, 20.0])
def test_kl_against_torch_and_scipy(temperature):
    z, v = case()
    p = torch.softmax(v / temperature, 1)
    ours = KullbackLeibler()(z, p, temperature)
    theirs = functional.kl_div(functional.log_softmax(z / temperature, 1), p, reduction="batchmean")
    assert ours.mean().item() == pytest.approx((theirs * temperature**2).item(), rel=1e-12)
    q = np.exp(log_softmax(z.numpy() / temperature, axis=1))
    forward = rel_entr(p.numpy(), q).sum(1) * temperature**2
    reverse = rel_entr(q, p.numpy()).sum(1) * temperature**2
    assert np.allclose(ours.numpy(), forward, rtol=1e-10)
    backward = ReverseKullbackLeibler()(z, p, temperature)
    assert np.allclose(backward.numpy(), reverse, rtol=1e-10)


def test_kl_with_impossible_classes_against_scipy():
    z, _ = case()
    p = torch.zeros(7, 5, dtype=torch.float64)
    p[:, :2] = 0.5
    q = torch.softmax(z, 1).numpy()
    ours = KullbackLeibler()(z, p, 1.0)
    assert np.allclose(ours.numpy(), rel_entr(p.numpy(), q).sum(1), rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_the_difference_of_soft_labels(temperature):
    """d/dz of T^2 KL(p || softmax(z/T)) is T (q - p), for soft cross-entropy too."""
    z, v = case()
    p = torch.softmax(v / temperature, 1)
    expected = temperature * (torch.softmax(z / temperature, 1) - p)
    for objective in (KullbackLeibler(), SoftCrossEntropy()):
        student = z.clone().requires_grad_()
        objective(student, p, temperature).sum().backward()
        assert torch.allclose(student.grad, expected, rtol=1e-10, atol=1e-12)


def test_soft_cross_entropy_against_torch():
    z, v = case()
    p = torch.softmax(v, 1)
    theirs = functional.cross_entropy(z, p, reduction="none")
    assert torch.allclose(SoftCrossEntropy()(z, p, 1.0), theirs)
