"""What a review of the stacked and the book-keeping routes found, held fast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import Batch, FitResult, fit
from fedkd.clients.stacked import linear
from fedkd.clients.stacked.request import Request, stacked
from fedkd.clients.teacher_terms import Peer, mutual
from fedkd.clients.terms import Distil, HeadSupervised, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.objectives.base import objectives
from fedkd.distill.targets import MaskedTargets
from fedkd.models.base import BlockNet
from fedkd.rng import Rng


def net(seed: int = 0) -> BlockNet:
    torch.manual_seed(seed)
    return BlockNet({"a": nn.Sequential(nn.Linear(5, 4), nn.ReLU())}, nn.Linear(4, 3))


def data(n: int, seed: int) -> Split:
    draw = torch.Generator().manual_seed(seed)
    return Split(torch.randn(n, 5, generator=draw), torch.randint(0, 3, (n,), generator=draw))


def request(model, split, training, dp=None, seed=0):
    return Request(model, split, [Supervised()], training, 0.1, Rng(seed), dp)


@pytest.mark.parametrize("bound", [1.0, 1e-3])
def test_tiny_inputs_do_not_carry_huge_signals_past_the_clipping(bound):
    def unbalanced():
        model = BlockNet({"a": nn.Linear(200, 200, bias=False)}, nn.Linear(200, 2, bias=False))
        with torch.no_grad():
            model.a.weight.zero_()
            model.head.weight[0], model.head.weight[1] = 2e17, -2e17
        return model

    split = Split(torch.full((2, 200), 2e-23), torch.zeros(2, dtype=torch.long))
    models = [unbalanced() for _ in range(2)]
    before = copy.deepcopy(models)
    training = Training(batch_size=2)
    asked = [
        Request(m, split, [Supervised()], training, 1.0, Rng(i), DpSgd(0.0, bound))
        for i, m in enumerate(models)
    ]
    assert all(isinstance(result, FitResult) for result in stacked(asked))
    for model, old in zip(models, before, strict=True):
        # Both examples are in the batch, whose sum is divided by two.
        assert (model.a.weight - old.a.weight).norm() <= bound * 1.001


def test_padding_that_is_not_finite_reaches_no_gradient():
    broken = data(6, 1)
    broken.x[0] = float("nan")
    training, splits = Training(batch_size=1, epochs=4), [broken, data(6, 2)]
    alone, together = [net(i) for i in range(2)], [net(i) for i in range(2)]
    expected = [
        fit(m, d, [Supervised()], training, 0.1, Rng(i), DpSgd(1.0))
        for i, (m, d) in enumerate(zip(alone, splits, strict=True))
    ]
    found = stacked(
        [
            request(m, d, training, DpSgd(1.0), i)
            for i, (m, d) in enumerate(zip(together, splits, strict=True))
        ]
    )
    for mine, theirs, result, wanted in zip(together, alone, found, expected, strict=True):
        assert isinstance(result, FitResult) and result.examples == wanted.examples
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)


def test_weights_used_twice_are_not_stacked():
    model = BlockNet({"a": nn.Linear(5, 5), "b": nn.Linear(5, 5)}, nn.Linear(5, 3))
    model.b.weight = model.a.weight
    plain = request(model, data(6, 1), Training())
    assert "used twice" in linear.reason(plain)
    before = copy.deepcopy(model)
    (result,) = stacked([plain])
    fit(before, plain.data, [Supervised()], plain.training, 0.1, Rng(0))
    assert isinstance(result, FitResult)
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_dp_sgd_refuses_is_refused_in_a_stack_too():
    def changing(seed):
        torch.manual_seed(seed)
        first = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True))
        return BlockNet({"a": first}, nn.Linear(4, 3))

    asked = [request(changing(i), data(6, i), Training(), DpSgd(0.0), i) for i in range(2)]
    results = stacked(asked)
    assert all("inplace" in str(result) for result in results)


@pytest.mark.parametrize("scale", [1.0, 1e7, 1e9])
def test_an_example_without_a_target_is_no_error_whatever_its_inputs(scale):
    targets = MaskedTargets(torch.full((6, 3), 1 / 3), torch.tensor([False] + [True] * 5))
    term = Distil(objectives.get("kl")(), targets, 1.0, 1.0)
    split = data(6, 3)
    split = Split(split.x * scale, split.y)
    model = BlockNet({"a": nn.Linear(5, 4)}, nn.Linear(4, 3))
    result = fit(model, split, [term], Training(batch_size=6), 1e-3, Rng(1), DpSgd(0.0, 1.0))
    assert result.examples == 6


def test_peers_and_heads_answer_in_full_precision_under_bf16():
    kinds = {}

    class Spy(Supervised):
        def mean(self, batch):
            kinds["peer"] = peer(batch)[0].dtype
            return super().mean(batch)

    peer, head = Peer(net(1)), nn.Linear(4, 3)
    terms = [Spy(), HeadSupervised(head, "a", 1.0)]
    training = Training(batch_size=4, precision="bf16")
    fit(net(), data(8, 1), terms, training, 0.1, Rng(0))
    assert kinds == {"peer": torch.float32}
    result = fit(
        net(), data(8, 1), mutual(Peer(net()), (1.0, 0.5), (1.0, 0.5)), training, 0.1, Rng(0)
    )
    # Two equal networks start equal; a divergence is never below zero.
    assert result.losses["distil"] >= -1e-6 and result.losses["peer_distil"] >= -1e-6


def test_the_mean_over_a_batch_is_over_all_its_rows():
    split = data(6, 1)
    split.y[2] = -100
    logits = net()(split.x)
    batch = Batch(split.x, split.y, torch.arange(6), logits, {})
    term = Supervised()
    assert torch.allclose(term.mean(batch), term(batch).mean())
