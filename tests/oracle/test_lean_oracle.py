"""The lean update against torch's optimizers: every bit of every weight, after several steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.clients.lean import Adam, Sgd, Wrapped, clipped, update_for
from fedkd.clients.local import batches, fit
from fedkd.clients.terms import HeadSupervised, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.models.base import BlockNet
from fedkd.rng import Rng

SETTINGS = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "decay": {"weight_decay": 0.03},
    "momentum and decay": {"momentum": 0.7, "weight_decay": 0.1},
    "adam": {"optimizer": "adam"},
    "adam and decay": {"optimizer": "adam", "weight_decay": 0.1},
    "clipped": {"momentum": 0.9, "max_grad_norm": 0.3},
    "adam clipped": {"optimizer": "adam", "max_grad_norm": 0.3},
    "frozen": {"momentum": 0.9, "frozen": ("conv",)},
    "adam frozen": {"optimizer": "adam", "frozen": ("head",)},
}


def filled(module):
    with torch.no_grad():
        for key, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=Rng(3).child(key).torch()) / 3)
    return module


def network():
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU())
    flat = nn.Sequential(nn.Flatten(), nn.Linear(4 * 36, 8), nn.ReLU())
    net = BlockNet({"conv": conv, "fc": flat}, nn.Linear(8, 4))
    return filled(net).to(memory_format=torch.channels_last)


def data(n=22):
    return Split(torch.randn(n, 2, 6, 6, generator=Rng(1).torch()), torch.arange(n) % 4)


def by_torch(net, heads, split, training, lr, rng):
    """The same steps by torch's loss, backward, clipping and optimizer."""
    for key, p in net.named_parameters():
        p.requires_grad_(key.split(".")[0] not in training.frozen)
    trained = [p for part in (net, *heads) for p in part.parameters() if p.requires_grad]
    optimizer = training.make(trained, lr)
    for epoch in range(training.epochs):
        for x, y, _ in batches(split, training.batch_size, rng.child("epoch", epoch)):
            optimizer.zero_grad()
            logits, features = net.forward_with_features(x, ["fc"])
            loss = functional.cross_entropy(logits, y)
            for head in heads[:1]:
                loss = loss + functional.cross_entropy(head(features["fc"]), y) * 0.5
            loss.backward()
            if training.max_grad_norm:
                nn.utils.clip_grad_norm_(trained, training.max_grad_norm)
            optimizer.step()


def bits(*modules):
    return [p.detach().contiguous().numpy().tobytes() for m in modules for p in m.parameters()]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_fit_ends_at_the_bits_of_torchs_own_optimizer(name):
    class Unread(HeadSupervised):
        """Brings a head that it never asks."""

        def __call__(self, batch):
            return torch.zeros_like(batch.y, dtype=torch.float32)

    training = Training(**{"batch_size": 8, "epochs": 3, **SETTINGS[name]})
    (ours, theirs), split = (network(), network()), data()
    mine, others = ([filled(nn.Linear(8, 4)) for _ in range(2)] for _ in range(2))
    before = bits(ours, *mine)
    terms = [Supervised(), HeadSupervised(mine[0], "fc", 0.5), Unread(mine[1], "fc", 1.0)]
    fit(ours, split, terms, training, 0.05, Rng(0))
    by_torch(theirs, others, split, training, 0.05, Rng(0))
    assert bits(ours, *mine) == bits(theirs, *others)
    assert bits(mine[1]) == before[-2:], "a head that nobody reads stays"
    assert bits(ours, *mine) != before


def reached(step, place):
    """Gradients come and go: now and then a parameter has none."""
    return (step + place) % 3 != 1


@pytest.mark.parametrize("name", [n for n in SETTINGS if "frozen" not in n])
def test_gradients_that_come_and_go(name):
    training = Training(**SETTINGS[name])
    shapes = [(5, 3), (7,), (), (2, 3, 4)]
    start = [torch.randn(s, generator=Rng(4, (i,)).torch()) for i, s in enumerate(shapes)]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    update, optimizer = update_for(training, ours, 0.1), training.make(theirs, 0.1)
    for step in range(9):
        found = [
            torch.randn(s, generator=Rng(5, (step, i)).torch()) if reached(step, i) else None
            for i, s in enumerate(shapes)
        ]
        for p, g in zip(theirs, found, strict=True):
            p.grad = None if g is None else g.clone()
        if training.max_grad_norm:
            nn.utils.clip_grad_norm_(theirs, training.max_grad_norm)
            found = clipped(found, training.max_grad_norm)
        optimizer.step()
        update(found)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step
    assert not any(torch.equal(a, b) for a, b in zip(ours, start, strict=True))


@pytest.mark.parametrize("kind", [Sgd, Adam])
def test_without_any_gradient_nothing_moves(kind):
    weight = nn.Parameter(torch.ones(3))
    kind([weight], 0.1)([None])
    assert weight.tolist() == [1, 1, 1]


def test_given_gradients_are_left_alone_and_may_be_one_tensor():
    same = torch.full((3,), 10.0)
    found = clipped([same, None, same], 1.0)
    assert found[1] is None
    assert torch.cat([found[0], found[2]]).norm().item() == pytest.approx(1, rel=1e-5)
    assert clipped([None], 1.0) == [None]
    for kind in (Sgd, Adam):
        update = kind([nn.Parameter(torch.zeros(3)) for _ in range(2)], 0.1, weight_decay=0.1)
        for _ in range(3):
            update([same, same])
    assert same.tolist() == [10, 10, 10]


def test_a_training_of_its_own_kind_keeps_its_optimizer():
    class Kept(Training):
        def make(self, parameters, lr):
            return torch.optim.RMSprop(parameters, lr=lr)

    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    update = update_for(Kept(), [weight, other], 0.1)
    assert isinstance(update, Wrapped)
    update([torch.ones(2), None])
    assert (weight < 1).all()
    assert (other == 1).all()
