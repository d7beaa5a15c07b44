"""``fit`` against a loop written by hand with torch's own loss and optimizers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.clients.local import fit
from fedkd.clients.terms import Proximal, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.models.base import BlockNet
from fedkd.rng import Rng


def network():
    net = BlockNet({"fc1": nn.Sequential(nn.Linear(6, 8), nn.ReLU())}, nn.Linear(8, 4))
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=Rng(3).child(key).torch()) / 2)
    return net


def data(n=23):
    return Split(torch.randn(n, 6, generator=Rng(1).torch()), torch.arange(n) % 4)


def by_hand(net, split, options, lr, smoothing=0.0, mu=0.0):
    """The textbook loop: shuffle, slice, forward, backward, clip, step."""
    if options.optimizer == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=options.weight_decay)
    else:
        optimizer = torch.optim.SGD(
            net.parameters(),
            lr=lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
    start = [p.detach().clone() for p in net.parameters()]
    done, epoch = 0, 0
    while done < options.steps if options.steps else epoch < options.epochs:
        order = torch.randperm(len(split), generator=Rng(0).child("epoch", epoch).torch())
        for index in order.split(options.batch_size):
            if options.steps and done == options.steps:
                break
            optimizer.zero_grad()
            logits = net.head(net.fc1(split.x[index]))
            loss = functional.cross_entropy(logits, split.y[index], label_smoothing=smoothing)
            for p, p0 in zip(net.parameters(), start, strict=True):
                loss = loss + mu / 2 * ((p - p0) ** 2).sum()
            loss.backward()
            if options.max_grad_norm:
                nn.utils.clip_grad_norm_(net.parameters(), options.max_grad_norm)
            optimizer.step()
            done += 1
        epoch += 1
    return net


SETTINGS = {
    "sgd": {},
    "momentum": {"momentum": 0.9, "epochs": 3},
    "decay": {"weight_decay": 0.1, "momentum": 0.5, "epochs": 2},
    "adam": {"optimizer": "adam", "epochs": 2, "weight_decay": 0.01},
    "steps": {"steps": 7, "momentum": 0.9},
    "clipped": {"max_grad_norm": 0.1, "epochs": 2},
    "one batch": {"batch_size": 100, "epochs": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_against_the_loop_by_hand(name):
    options = Training(**{"batch_size": 5, **SETTINGS[name]})
    ours, theirs = network(), network()
    fit(ours, data(), [Supervised()], options, 0.05, Rng(0))
    by_hand(theirs, data(), options, 0.05)
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-7), key


def test_label_smoothing_and_proximal_against_the_loop_by_hand():
    options = Training(batch_size=5, epochs=2)
    ours, theirs = network(), network()
    start = {key: p.detach().clone() for key, p in ours.named_parameters()}
    terms = [Supervised(label_smoothing=0.2), Proximal(ours, start, 0.7)]
    fit(ours, data(), terms, options, 0.05, Rng(0))
    by_hand(theirs, data(), options, 0.05, smoothing=0.2, mu=0.7)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-6)


def test_a_proximal_gradient_is_mu_times_the_distance():
    net, mu = network(), 0.3
    at = {k: torch.randn(p.shape, generator=Rng(8).child(k).torch()) for k, p in net_items(net)}
    term = Proximal(net, at, mu)
    (term(None) * term.weight).backward()
    for key, p in net_items(net):
        assert torch.allclose(p.grad, mu * (p.detach() - at[key]), atol=1e-6), key
    assert term(None).item() * term.weight == pytest.approx(
        mu / 2 * sum(((p.detach() - at[k]) ** 2).sum().item() for k, p in net_items(net)), rel=1e-5
    )


def net_items(net):
    return list(net.named_parameters())


def test_cosine_against_torchs_own_schedule():
    options = Training(lr=0.4, schedule="cosine", final_lr=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=9, eta_min=0.04)
    for round_ in range(1, 11):
        assert math.isclose(options.lr_at(round_, 10), theirs.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step()
        theirs.step()
