"""A round of DHO written out by hand, its bytes in closed form, and the mechanism it claims."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from fedkd.clients.dual_head import Labelled
from fedkd.clients.local import Batch, batches
from fedkd.clients.terms import Distil, Supervised
from fedkd.data.federated import Split
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import SampleTargets
from fedkd.models.base import BlockNet
from fedkd.rng import Rng
from fedkd.types import select

FLOAT, C, POOL = 4, 10, 40
SHAPES = {"fc1": (16, 64), "fc2": (12, 16), "head": (10, 12)}
P = sum(m * n + m for m, n in SHAPES.values())
HEAD = 10 * 12 + 10
OPTIONS = {
    "name": "dho",
    "lam": 0.3,
    "labelled_weight": 0.7,
    "unlabelled_weight": 1.3,
    "temperature": 3.0,
    "teacher_mix": 0.4,
    "pool_batch_size": 16,
}


def mixture(ce, kd):
    """``a softmax(ce) + (1 - a) softmax(kd)``, not in logarithms."""
    a = OPTIONS["teacher_mix"]
    return a * torch.softmax(ce, 1) + (1 - a) * torch.softmax(kd, 1)


def divergence(probs, logits):
    """``T^2 mean_i sum_c p log(p / q)`` with both at T, p given at 1."""
    t = OPTIONS["temperature"]
    p = probs ** (1 / t)
    p = p / p.sum(1, keepdim=True)
    q = torch.softmax(logits / t, 1)
    return t**2 * (p * (p / q).log()).sum(1).mean()


def written_out(client, received):
    """Return all parameters after a round, those of the supervised head last, and the scores."""
    model = client.model(select(received, "model"))
    own = select(client.state, "head/fc2")
    parts = [*model.parameters(), *(torch.tensor(own[f"head.{k}"]) for k in ("weight", "bias"))]
    parts = [p.detach().double().clone().requires_grad_() for p in parts]

    def said(x):
        w1, b1, w2, b2, kd, kd_b, ce, ce_b = parts
        hidden = torch.relu(x.double().flatten(1) @ w1.T + b1)
        hidden = torch.relu(hidden @ w2.T + b2)
        return hidden @ ce.T + ce_b, hidden @ kd.T + kd_b

    train, training = client.data.train, client.training
    with torch.no_grad():
        own_lesson = mixture(*said(train.x))
    lesson = torch.tensor(received["soft_labels/consensus"]).double()
    order = torch.randperm(POOL, generator=client.rng("pool").child(0).torch())
    drawn = order.split(OPTIONS["pool_batch_size"])
    steps = batches(train, training.batch_size, client.rng("local").child("epoch", 0))
    lam = OPTIONS["lam"]
    for step, (x, y, index) in enumerate(steps):
        public = drawn[step]
        ce, kd = said(x)
        loss = lam * functional.cross_entropy(ce, y)
        loss = loss + (1 - lam) * 0.7 * divergence(own_lesson[index], kd)
        loss = loss + (1 - lam) * 1.3 * divergence(lesson[public], said(client.public.x[public])[1])
        gradients = torch.autograd.grad(loss, parts)
        with torch.no_grad():
            for p, g in zip(parts, gradients, strict=True):
                p.sub_(g, alpha=training.lr)
    with torch.no_grad():
        return [p.detach() for p in parts], mixture(*said(client.public.x))


def test_a_round_is_what_the_formula_says(tiny, play):
    run = play(tiny(OPTIONS, {"rounds": 3, "evaluate.every": 3}), rounds=1)
    strategy, setting = run.prepared.strategy, run.prepared.setting
    compared = 0
    for info in setting.clients:
        received = strategy.broadcast(run.state, info, 2, setting)
        client, twin = (
            run.runtime.side.client(run.grid.contexts[1000 + info.id], 2) for _ in range(2)
        )
        if len(client.data.train) > 3 * client.training.batch_size:
            continue  # the pool is passed once in the oracle
        expected, scores = written_out(client, received)
        arrays = strategy.local_update(twin, received).arrays
        kept = select(twin.state, "head/fc2")
        found = [*select(arrays, "model").values(), kept["head.weight"], kept["head.bias"]]
        for mine, theirs in zip(found, expected, strict=True):
            assert np.allclose(mine, theirs.numpy(), rtol=1e-4, atol=2e-6)
        assert np.allclose(arrays["soft_labels/scores"], scores.numpy(), atol=1e-5)
        compared += 1
    assert compared >= 2


@pytest.mark.parametrize("subset", [0, 16])
def test_bytes_of_heads_and_scores(subset, tiny, play):
    """Up 4 (P + Q C), down 4 P, and 4 Q C of consensus from round 2 on; nothing in the last."""
    q = subset or POOL
    for head, extra in (("personal", {}), ("averaged", {"global_head": HEAD})):
        options = {"name": "dho", "subset": subset, "supervised_head": head}
        run = play(tiny(options, {"rounds": 3, "evaluate.every": 3}))
        for round_ in (1, 2, 3):
            for direction, talks in (("up", round_ < 3), ("down", round_ > 1)):
                floats = {"model": P, **extra, **({"soft_labels": q * C} if talks else {})}
                expected = {kind: 4 * n * FLOAT for kind, n in floats.items()}
                totals = run.ledger.totals(round=round_, phase="train", direction=direction)
                assert totals.tensors == expected
        judged = run.ledger.totals(round=3, phase="evaluate", direction="down").tensors
        assert judged == {kind: 4 * n * FLOAT for kind, n in {"model": P, **extra}.items()}


# The mechanism: labels and soft targets pull a shared head, and so the backbone, two ways.


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def network(seed):
    """Return a small network and a second head, drawn from a seed."""
    net = BlockNet({"fc1": nn.Sequential(nn.Linear(64, 32), nn.ReLU())}, nn.Linear(32, C))
    head = BlockNet({"hidden": nn.Identity()}, nn.Linear(32, C))
    for i, p in enumerate([*net.parameters(), *head.parameters()]):
        scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.0
        p.data = torch.randn(p.shape, generator=Rng(seed).child(i).torch()) * scale
    return net, head


def descend(parameters, loss, lr):
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data.sub_(g, alpha=lr)


def taught(x, y, seed):
    """Return what a teacher of 200 examples of all classes says, softened: right mostly."""
    net, _ = network(seed + 100)
    known = torch.randperm(len(x), generator=Rng(seed).child("known").torch())[:200]
    for _ in range(40):
        descend(list(net.parameters()), functional.cross_entropy(net(x[known]), y[known]), 0.5)
    return torch.softmax(net(x).detach() / 2.0, 1)


def conflicts(data, soft, heads, seed, steps=140, after=80):
    """Return the share of late steps in which both losses pull the backbone against each other.

    The cosine of the gradients of the labels' and of the soft targets' loss with respect to the
    backbone's weights is negative; steps before ``after``, where every loss falls, do not count.
    """
    net, other = network(seed)
    tied = BlockNet({"hidden": nn.Identity()}, net.get_submodule("head"))
    labels = Labelled(other if heads == 2 else tied, "fc1", 0.5)
    distil = Distil(KullbackLeibler(), SampleTargets(soft), 2.0, 0.5)
    body = list(net.get_submodule("fc1").parameters())
    trained = [*net.parameters(), *(other.parameters() if heads == 2 else ())]
    generator, against = Rng(seed).child("batches").torch(), 0
    for step in range(steps):
        index = torch.randperm(len(data), generator=generator)[:16]
        x, y = data.x[index], data.y[index]
        logits, features = net.forward_with_features(x, ("fc1",))
        batch = Batch(x, y, index, logits, features)
        one, two = labels.mean(batch), distil.mean(batch)
        if step >= after:
            g, h = (torch.autograd.grad(v, body, retain_graph=True) for v in (one, two))
            dot = sum((a * b).sum() for a, b in zip(g, h, strict=True))
            against += bool(dot < 0)
        descend(trained, 0.5 * one + 0.5 * two, 0.1)
    return against / (steps - after)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_heads_spare_the_backbone_conflicts(seed, digits):
    """The paper's mechanism: with labels of four classes and a teacher of all ten."""
    x, y = digits
    few = torch.nonzero(y < 4)[:, 0]
    few = few[torch.randperm(len(few), generator=Rng(seed).child("few").torch())[:100]]
    data, soft = Split(x[few], y[few]), taught(x, y, seed)[few]
    two, one = (conflicts(data, soft, heads, seed) for heads in (2, 1))
    print(two, one)
    assert two < one - 0.1


def test_tied_heads_are_one_head(digits):
    """What the mechanism is measured against is plain training of one head on both losses."""
    net, _ = network(0)
    tied = BlockNet({"hidden": nn.Identity()}, net.get_submodule("head"))
    x, y = digits[0][:8], digits[1][:8]
    logits, features = net.forward_with_features(x, ("fc1",))
    batch = Batch(x, y, torch.arange(8), logits, features)
    one, other = Labelled(tied, "fc1", 1.0).mean(batch), Supervised().mean(batch)
    assert one.item() == pytest.approx(other.item(), rel=1e-6)


# The effect: knowledge of labels reaches the averaged head, though it never sees one.


def test_the_distilled_head_learns_what_it_is_never_told(tiny, play):
    """Ten classes over skewed clients: the head without labels is far above chance for all ten."""
    changes = {
        "rounds": 6,
        "evaluate.every": 6,
        "model.hidden": [32],
        "data.source.limit": 240,
        "data.partition.alpha": 0.1,
        "data.public.size": 40,
        "clients.training.lr": 0.3,
        "clients.training.epochs": 3,
    }
    run = play(tiny("dho", changes))
    found = {
        (predict, split): run.log.table("accuracy", split, "composite", predict)[-1].mean()
        for predict in ("personal", "kd_head", "ce_head")
        for split in ("test", "global")
    }
    print(found)
    assert found["kd_head", "global"] > 0.5
    assert found["kd_head", "global"] > found["ce_head", "global"]
    assert found["personal", "test"] > found["kd_head", "test"]
