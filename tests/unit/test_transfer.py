"""The ensemble of teachers and the student that learns from it on the server."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.clients import chunk
from fedkd.clients.terms import Supervised
from fedkd.clients.training import Training
from fedkd.clients.transfer import Ensemble, frozen, transfer
from fedkd.distill.fusion_rules import ClassCounts, MeanLogits, MeanProbabilities
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.models.initial import initialise
from fedkd.rng import stream

D, C, N, K = 6, 4, 21, 3
RNG = stream(0, "transfer")


def net(*address):
    made = BlockNet({"fc1": nn.Sequential(nn.Linear(D, 8), nn.ReLU())}, nn.Linear(8, C))
    initialise(made, RNG.child(*address))
    with torch.no_grad():
        for p in made.parameters():
            p.mul_(3)
    return made


def inputs(n=N):
    return torch.randn(n, D, generator=RNG.child("x").torch())


def ensemble(fusion=None, **more):
    return Ensemble([net("teacher", k) for k in range(K)], fusion or MeanLogits(), **more)


def values(network):
    return {k: p.detach().clone() for k, p in network.named_parameters()}


def same(one, other):
    return all(torch.equal(one[k], other[k]) for k in one)


def divergence(student, x, probs, temperature):
    with torch.no_grad():
        logq = functional.log_softmax(student(x) / temperature, dim=1)
    return float(functional.kl_div(logq, probs, reduction="batchmean") * temperature**2)


def taught(student, x, probs, steps=1, lr=0.1, batch_size=N, **more):
    training = more.pop("training", None) or Training(steps=steps, lr=lr, batch_size=batch_size)
    options = {"objective": KullbackLeibler(), "temperature": 2.0, "rng": RNG.child("fit")}
    return transfer(student, x, probs, training=training, **(options | more))


def test_gradient_reaches_the_inputs_and_no_teacher():
    made = ensemble()
    x = inputs().requires_grad_()
    made.probs(x, 1.0)[:, 0].sum().backward()
    assert float(x.grad.abs().sum()) > 0
    for teacher in made.teachers:
        assert not teacher.training
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_probabilities_are_the_fused_softmax_of_the_teachers():
    made, x = ensemble(), inputs()
    logits = torch.stack([teacher(x) for teacher in made.teachers])
    assert torch.equal(made.logits(x), logits)
    expected = functional.softmax(logits.mean(0) / 3.0, dim=1)
    torch.testing.assert_close(made.probs(x, 3.0), expected)


def test_weights_scale_teachers_and_ones_change_nothing():
    x = inputs()
    plain = ensemble().probs(x, 2.0)
    assert torch.equal(ensemble(weights=torch.ones(K)).probs(x, 2.0), plain)
    made = ensemble(weights=torch.tensor([3.0, 0.0, 0.0]))
    alone = functional.softmax(made.teachers[0](x) / 2.0, dim=1)
    torch.testing.assert_close(made.probs(x, 2.0), alone)


@pytest.mark.parametrize("n", [1, 7, 8, N])
@pytest.mark.parametrize("labelled", [False, True])
def test_targets_in_chunks_equal_one_pass(n, labelled, monkeypatch):
    shares = torch.rand(K, C, generator=RNG.child("shares").torch())
    made = ensemble(ClassCounts(), shares=shares / shares.sum(0))
    x, y = inputs(n), torch.arange(n) % C if labelled else None
    whole = made.probs(x, 2.0, y)
    monkeypatch.setattr(chunk, "CHUNK", 7)
    targets = made.targets(x, 2.0, y)
    assert not targets.requires_grad
    torch.testing.assert_close(targets, whole.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.sum(1), torch.ones(n))


def test_the_loss_is_batchmean_with_the_square_of_the_temperature():
    student, x = net("student"), inputs()
    probs = ensemble().targets(x, 2.0)
    before = divergence(student, x, probs, 2.0)
    result = taught(student, x, probs)
    np.testing.assert_allclose(result.losses["distil"], before, rtol=1e-5)
    assert result.examples == N


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_transfer_lowers_the_divergence_and_leaves_the_teachers(optimizer):
    student, x, made = net("student"), inputs(), ensemble()
    teachers = [values(t) for t in made.teachers]
    probs = made.targets(x, 2.0)
    before = divergence(student, x, probs, 2.0)
    training = Training(steps=60, lr=0.02, batch_size=8, optimizer=optimizer)
    result = taught(student, x, probs, training=training)
    assert result.steps == 60
    assert divergence(student, x, probs, 2.0) < 0.5 * before
    assert all(same(a, values(t)) for a, t in zip(teachers, made.teachers, strict=True))


def test_a_student_that_knows_stays_as_it_is():
    student, x = net("student"), inputs()
    probs = Ensemble([net("student")], MeanProbabilities()).targets(x, 2.0)
    before = values(student)
    taught(student, x, probs, steps=5)
    after = values(student)
    assert max(float((after[k] - before[k]).abs().max()) for k in before) < 1e-6


def test_examples_of_weight_zero_teach_nothing():
    x = inputs()
    probs = ensemble().targets(x, 2.0)
    few, all_ = net("student"), net("student")
    chosen = torch.arange(N) % 3 == 0
    weights = chosen.float() / chosen.float().mean()
    taught(all_, x, probs, weights=weights)
    taught(few, x[chosen], probs[chosen], batch_size=int(chosen.sum()))
    for key, value in values(few).items():
        torch.testing.assert_close(value, values(all_)[key], rtol=1e-5, atol=1e-6)
    plain = net("student")
    taught(plain, x, probs)
    assert not same(values(plain), values(all_))


def test_equal_weights_are_no_weights():
    x = inputs()
    probs = ensemble().targets(x, 2.0)
    one, other = net("student"), net("student")
    taught(one, x, probs, steps=4, batch_size=5)
    taught(other, x, probs, steps=4, batch_size=5, weights=torch.ones(N))
    assert same(values(one), values(other))


def test_labels_are_for_further_terms_only():
    x = inputs()
    probs = ensemble().targets(x, 2.0)
    y = torch.arange(N) % C
    one, other, more = net("student"), net("student"), net("student")
    taught(one, x, probs)
    taught(other, x, probs, labels=y)
    result = taught(more, x, probs, labels=y, terms=[Supervised(weight=0.5)])
    assert same(values(one), values(other))
    assert not same(values(one), values(more))
    expected = functional.cross_entropy(net("student")(x), y)
    np.testing.assert_allclose(result.losses["supervised"], float(expected.detach()), rtol=1e-5)


def test_the_same_address_gives_the_same_bits():
    x = inputs()
    probs = ensemble().targets(x, 2.0)
    students = [net("student") for _ in range(3)]
    for student, rng in zip(students, [RNG, RNG, RNG.child("other")], strict=True):
        taught(student, x, probs, steps=4, batch_size=5, rng=rng)
    assert same(values(students[0]), values(students[1]))
    assert not same(values(students[0]), values(students[2]))


def test_a_student_that_diverges_names_the_option_to_lower():
    x = inputs() * 1e20
    probs = ensemble().targets(inputs(), 2.0)
    with pytest.raises(RunError, match=r"lower strategy\.server_lr \(now 1e\+30\)"):
        taught(net("student"), x, probs, steps=9, lr=1e30)
    with pytest.raises(RunError, match=r"lower strategy\.kd_lr"):
        taught(net("student"), x, probs, steps=9, lr=1e30, where="strategy.kd_lr")


def test_frozen_holds_a_network_and_gives_it_back():
    network, x = net("student"), inputs().requires_grad_()
    before = values(network)
    network.train()
    with frozen(network) as held:
        assert not held.training
        held(x).sum().backward()
        assert all(not p.requires_grad and p.grad is None for p in held.parameters())
        assert float(x.grad.abs().sum()) > 0
    assert all(p.requires_grad for p in network.parameters())
    assert same(before, values(network))


def test_frozen_gives_back_after_an_error():
    network = net("student")
    with pytest.raises(ZeroDivisionError), frozen(network):
        raise ZeroDivisionError
    assert all(p.requires_grad for p in network.parameters())


def test_answers_that_are_known_are_not_asked_for_again():
    of, x = ensemble(MeanProbabilities()), inputs()
    known = of.answers(x)
    assert torch.equal(known, of.logits(x).detach())
    for teacher in of.teachers:
        teacher.register_forward_hook(lambda *_: pytest.fail("a teacher was asked"))
    found = of.targets(x, 2.0, answers=known)
    assert torch.equal(found, of.fuse(known, 2.0))


def test_targets_and_answers_can_stand_in_a_graph():
    of, x = ensemble(), inputs()
    w = torch.ones(C, requires_grad=True)
    for constants in (of.targets(x, 1.0), of.answers(x)[0]):
        assert not constants.is_inference() and not constants.requires_grad
        (gradient,) = torch.autograd.grad((w * constants).sum(), w)
        assert torch.allclose(gradient, constants.sum(0))
