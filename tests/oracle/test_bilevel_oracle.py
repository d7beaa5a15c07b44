"""The gradient through one step of training, against that step taken, by differences."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from fedkd.clients.bilevel import Unrolled
from fedkd.clients.guided import Guide, distil
from fedkd.clients.local import Batch, Occasion
from fedkd.data.federated import Split
from fedkd.distill.chosen import chosen, chosen_policy
from fedkd.distill.targets import SampleTargets
from fedkd.models.base import BlockNet
from fedkd.rng import Rng

N, CLASSES, ETA = 6, 3, 0.3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=Rng(seed).torch(), dtype=torch.float64)


def network():
    blocks = {"fc1": nn.Sequential(nn.Linear(4, 5), nn.Tanh())}
    return BlockNet(blocks, nn.Linear(5, CLASSES)).double()


DATA = Split(drawn(N, 4, seed=1), torch.arange(N) % CLASSES)
HELD = Split(drawn(9, 4, seed=2), torch.arange(9) % CLASSES)
SOFT = torch.softmax(2 * drawn(N, CLASSES, seed=3), 1)


def occasion(net):
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(drawn(*p.shape, seed=20 + i) / 2)
    return Occasion(net, DATA, ETA, Rng(5), {}, lambda: HELD)


def outcome(net, gradients):
    """The loss on validation examples after a step of plain gradient descent."""
    named = dict(net.named_parameters())
    found = {k: p - ETA * g for (k, p), g in zip(named.items(), gradients, strict=True)}
    return functional.cross_entropy(functional_call(net, found, (HELD.x,)), HELD.y)


def test_slopes_are_the_derivatives_of_the_loss_after_a_step():
    net = network()
    made = Unrolled(occasion(net), HELD)
    r = drawn(N, CLASSES, seed=4) / N
    found = made.slopes(torch.arange(N), r)

    def after(r):
        logits = net(DATA.x)
        return outcome(net, torch.autograd.grad(logits, list(net.parameters()), r)).item()

    for i in range(N):
        for c in range(CLASSES):
            way = torch.zeros(N, CLASSES, dtype=torch.float64)
            way[i, c] = 1e-5
            slope = (after(r + way) - after(r - way)) / 2e-5
            assert found[i, c].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)


def taught(net, on, name="kl"):
    """A term under tgeo, ready for a fit, and its policy with weights that are not small."""
    policy = chosen_policy("tgeo")
    guide = Guide((policy,), 0.0, 1.0, 4)
    term = distil(chosen(name), SampleTargets(SOFT), 2.0, 1.0, guide=guide)
    (term,) = term.placed(on)
    (controller,) = policy.modules()
    controller.double()
    with torch.no_grad():
        for i, p in enumerate(controller.parameters()):
            p.copy_(drawn(*p.shape, seed=40 + i) / 3)
    return term, policy, list(controller.parameters())


def asked(net, term):
    index = torch.arange(N)
    return term(Batch(DATA.x, DATA.y, index, net(DATA.x), {})).mean()


@pytest.mark.parametrize("name", ["kl", "js", "pld"])
def test_the_ratio_learns_by_the_gradient_of_what_a_step_leads_to(name):
    net = network()
    term, policy, own = taught(net, occasion(net), name)
    told = []
    object.__setattr__(policy, "learn", told.append)
    asked(net, term)
    (found,) = told

    def after():
        term.guide.unrolled = None
        loss = asked(net, term)
        return outcome(net, torch.autograd.grad(loss, list(net.parameters()))).item()

    for p, slopes in zip(own, found, strict=True):
        for at in range(0, p.numel(), max(1, p.numel() // 7)):
            before = p.data.view(-1)[at].item()
            values = []
            for way in (1e-5, -1e-5):
                p.data.view(-1)[at] = before + way
                values.append(after())
            p.data.view(-1)[at] = before
            slope = (values[0] - values[1]) / 2e-5
            assert slopes.view(-1)[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)
    assert any(g.any() for g in found)
