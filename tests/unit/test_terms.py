"""Loss terms: what they read, whom they move, what is masked."""

import pytest
import torch
from torch import nn

from fedkd.clients.heads import Weighted
from fedkd.clients.local import Batch
from fedkd.clients.terms import Distil, HeadSupervised, Proximal, Supervised
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import ClassTargets, SampleTargets
from fedkd.models.base import BlockNet
from fedkd.rng import Rng

CLASSES = 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch())


def network():
    return BlockNet({"fc1": nn.Linear(4, 5), "fc2": nn.Linear(5, 6)}, nn.Linear(6, CLASSES))


def batch_of(net, at=(), n=8):
    x = drawn(n, 4)
    logits, features = net.forward_with_features(x, at)
    return Batch(x, torch.arange(n) % CLASSES, torch.arange(n), logits, features)


def test_absent_classes_are_masked_not_taught_zeros():
    net = network()
    batch = batch_of(net)
    probs = torch.softmax(drawn(CLASSES, CLASSES, seed=1), 1)
    known = torch.tensor([True, False, True])
    term = Distil(KullbackLeibler(), ClassTargets(probs, known), 2.0, 1.0)
    values = term(batch)
    everywhere = Distil(KullbackLeibler(), ClassTargets(probs, known | True), 2.0, 1.0)(batch)
    assert torch.equal(values[batch.y == 1], torch.zeros(int((batch.y == 1).sum())))
    assert torch.equal(values[batch.y != 1], everywhere[batch.y != 1])
    (grad,) = torch.autograd.grad(values.sum(), batch.logits)
    assert (grad[batch.y == 1] == 0).all()
    assert (grad[batch.y != 1] != 0).any(1).all()


def test_a_teacher_gets_no_gradient():
    net, teacher = network(), network()
    batch = batch_of(net)
    with torch.no_grad():
        probs = torch.softmax(teacher(batch.x), 1)
    loss = Distil(KullbackLeibler(), SampleTargets(probs), 1.0, 1.0)(batch).mean()
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("kind", ["head", "distil"])
def test_a_head_moves_itself_and_the_blocks_below_only(kind):
    net, head = network(), nn.Linear(5, CLASSES)
    batch = batch_of(net, ("fc1",))
    probs = torch.softmax(drawn(8, CLASSES, seed=2), 1)
    terms = {
        "head": HeadSupervised(head, "fc1", 1.0),
        "distil": Distil(KullbackLeibler(), SampleTargets(probs), 1.0, 1.0, head, "fc1"),
    }
    term = terms[kind]
    assert term.at() == {"fc1"}
    assert list(term.modules()) == [head]
    term(batch).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.fc1.parameters())
    assert all(p.grad.abs().sum() > 0 for p in head.parameters())
    assert all(p.grad is None for p in (*net.fc2.parameters(), *net.head.parameters()))


def test_terms_of_the_output_need_no_features():
    probs = torch.full((8, CLASSES), 1 / CLASSES)
    for term in (Supervised(), Distil(KullbackLeibler(), SampleTargets(probs), 1.0, 1.0)):
        assert term.at() == frozenset()
        assert list(term.modules()) == []
        assert term(batch_of(network())).shape == (8,)


def test_supervised_smoothing_is_the_mixed_target():
    batch = batch_of(network())
    logp = torch.log_softmax(batch.logits, 1)
    target = 0.7 * torch.eye(CLASSES)[batch.y] + 0.3 / CLASSES
    expected = -(target * logp).sum(1)
    assert torch.allclose(Supervised(label_smoothing=0.3)(batch), expected, atol=1e-6)


def test_weighted_has_mean_one_and_passes_on_what_the_term_needs():
    net, head = network(), nn.Linear(5, CLASSES)
    batch = batch_of(net, ("fc1",))
    inner = HeadSupervised(head, "fc1", 0.25)
    weights = torch.arange(1.0, 9.0)
    term = Weighted(inner, weights)
    assert (term.weight, term.at(), list(term.modules())) == (0.25, {"fc1"}, [head])
    assert torch.allclose(term(batch), inner(batch) * weights / 4.5)
    swapped = Batch(batch.x, batch.y, batch.index.flip(0), batch.logits, batch.features)
    assert torch.allclose(term(swapped), inner(batch) * weights.flip(0) / 4.5)


def test_the_classes_under_privacy():
    net = network()
    reference = {key: p.detach() for key, p in net.named_parameters()}
    assert Proximal(net, reference, 1.0).dp == "weights-only"
    assert Supervised().dp == HeadSupervised(nn.Linear(1, 1), "x", 1.0).dp == "per-example"


def test_proximal_ignores_what_the_network_does_not_have():
    net = network()
    reference = {"fc1.weight": torch.zeros(5, 4), "other": torch.ones(3)}
    expected = net.fc1.weight.detach().square().sum()
    assert torch.allclose(Proximal(net, reference, 2.0)(None), expected)
