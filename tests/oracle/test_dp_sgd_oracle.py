"""DP-SGD against a reference that takes examples one by one: clip, sum, add noise, divide."""

import pytest
import torch
from torch import nn

from fedkd.clients.dp_sgd import DpSgd, poisson
from fedkd.clients.local import Batch, Term, fit
from fedkd.clients.noise import Noise
from fedkd.clients.per_example import attached, linear_norms
from fedkd.clients.teacher_terms import FromPeer, Peer, PeerSupervised, ToPeer
from fedkd.clients.terms import Distil, HeadSupervised, Proximal, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.targets import SampleTargets
from fedkd.models.base import BlockNet, build
from fedkd.models.book import load, to_arrays
from fedkd.models.registries import models
from fedkd.rng import Rng
from fedkd.types import Task

TEXT = ("gpt-tiny", "lstm")
"""Models that read rows of text: see test_sequence_models.py."""

TASK = Task(name="colour", input_shape=(3, 12, 12), classes=3)
SMALL = {
    "mlp": {"hidden": [7, 6]},
    "cnn": {"channels": [4, 5], "hidden": 8},
    # oneDNN's strided 1x1 convolutions corrupt memory below 16 channels (its issue 6035).
    "resnet8": {"width": 16, "groups": 2},
    "vit-tiny": {"width": 8, "depth": 1, "heads": 2, "hidden": 12},
}
MODES = ["hooks", "functorch", "ghost", "bookkeeping"]


def network(name, seed=0):
    return build(name, SMALL.get(name, {}), TASK, Rng(seed))


def data(n=9):
    x = torch.randn(n, *TASK.input_shape, generator=Rng(1).torch())
    return Split(x.to(memory_format=torch.channels_last), torch.arange(n) % 3)


def linear(sizes, seed):
    layer = nn.Linear(*sizes)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(torch.randn(p.shape, generator=Rng(seed).child(name).torch()) / 4)
    return layer


def terms_for(net, n=9):
    """Labels, two heads on features (one on the first block, shared by two terms), a teacher."""
    first, last = net.block_names[0], net.block_names[-1]
    heads = [linear((net.feature_size(TASK, b), 3), i) for i, b in enumerate((first, last))]
    probs = torch.softmax(torch.randn(n, 3, generator=Rng(2).torch()), dim=1)
    return [
        Supervised(),
        HeadSupervised(heads[0], first, 0.5),
        HeadSupervised(heads[1], last, 2.0),
        Distil(KullbackLeibler(), SampleTargets(probs), 2.0, 0.7, heads[0], first),
    ]


def parts_of(net, terms):
    return [net, *(m for t in terms for m in t.modules())]


def loss_of(net, terms, x, y, index):
    at = frozenset().union(*(t.at() for t in terms))
    logits, features = net.forward_with_features(x, at)
    batch = Batch(x, y, index, logits, features)
    return sum(t.weight * t(batch) for t in terms)


def alone(net, terms, split, index, parameters):
    """The gradient of each example by plain autograd on a batch of one: a list of lists."""
    gradients = []
    for i in index.tolist():
        one = torch.tensor([i])
        loss = loss_of(net, terms, split.x[one], split.y[one], one).sum()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append(
            [
                torch.zeros_like(p) if g is None else g
                for g, p in zip(found, parameters, strict=True)
            ]
        )
    return gradients


def trained(net, terms):
    named = {id(p): p for part in parts_of(net, terms) for p in part.parameters()}
    return list(named.values())


def reference(net, split, terms, training, lr, rng, dp):
    """DP-SGD with plain SGD, one example at a time, on the same coins and the same noise."""
    own = [t for t in terms if t.dp == "per-example"]
    apart = [t for t in terms if t.dp == "weights-only"]
    parameters = trained(net, terms)
    noise = Noise(
        rng.child("dp-noise", dp.address), dp.noise_multiplier * dp.max_grad_norm, dp.mode
    )
    expected = min(training.batch_size, len(split))
    for _, _, index in poisson(split, training, rng):
        total = [torch.zeros_like(p) for p in parameters]
        for gradient in alone(net, own, split, index, parameters):
            norm = torch.cat([g.flatten() for g in gradient]).norm()
            factor = min(1.0, dp.max_grad_norm / (float(norm) + 1e-6))
            for t, g in zip(total, gradient, strict=True):
                t.add_(factor * g)
        noise.add(total)
        for t in total:
            t.div_(expected)
        for term in apart:
            value = term.weight * term(None)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
            for t, g in zip(total, found, strict=True):
                t.add_(0 if g is None else g)
        with torch.no_grad():
            for p, t in zip(parameters, total, strict=True):
                p.sub_(lr * t)


def close(one, other, scale=1.0):
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=2e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("name", [n for n in models.names() if n not in TEXT])
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_per_example_gradients_equal_those_of_examples_alone(name, mode):
    net = network(name)
    terms, split, index = terms_for(net), data(), torch.arange(9)
    parameters = trained(net, terms)
    truth = alone(net, terms, split, index, parameters)
    x = split.x.to(memory_format=torch.contiguous_format)
    with attached(parts_of(net, terms), mode, 1.0) as gradients:
        gradients.clear()
        assert gradients.backward(loss_of(net, terms, x, split.y, index)).all()
        found = [p.grad_sample.clone() for p in parameters]
    close(found, [torch.stack(each) for each in zip(*truth, strict=True)])


@pytest.mark.parametrize("name", [n for n in models.names() if n not in TEXT])
@pytest.mark.parametrize("mode", MODES)
def test_an_update_equals_the_reference(name, mode):
    dp = DpSgd(noise_multiplier=0.3, max_grad_norm=2.0, mode=mode)
    training, results = Training(steps=3, batch_size=5), []
    for ours in (True, False):
        net = network(name)
        start = {k: p.detach().clone() for k, p in net.named_parameters()}
        terms = [*terms_for(net), Proximal(net, start, 0.5)]
        if ours:
            fit(net, data(), terms, training, 0.5, Rng(5), dp)
        else:
            reference(net, data(), terms, training, 0.5, Rng(5), dp)
        results.append([p.detach() for p in trained(net, terms)])
        moved = [(p - start[k]).norm() for k, p in net.named_parameters()]
        assert min(moved) > 1e-3
    close(*results, scale=5)


@pytest.mark.parametrize("mode", MODES)
def test_two_networks_that_learn_together_have_one_joint_gradient(mode):
    dp = DpSgd(noise_multiplier=0.5, max_grad_norm=0.5, mode=mode)
    training, results = Training(steps=3, batch_size=5), []
    for ours in (True, False):
        net, other = network("cnn"), network("mlp", seed=3)
        peer = Peer(other)
        terms = [Supervised(0.6), PeerSupervised(peer, 0.7), FromPeer(peer, 0.4), ToPeer(peer, 0.3)]
        learn = fit if ours else reference
        learn(net, data(), terms, training, 0.5, Rng(5), dp)
        results.append([p.detach() for p in trained(net, terms)])
    close(*results, scale=5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_no_noise_no_bound_and_all_examples_are_plain_training(name, mode):
    split, training = data(), Training(epochs=3, batch_size=9)
    off = DpSgd(noise_multiplier=0.0, max_grad_norm=float("inf"), mode=mode)
    nets, results = [network(name) for _ in range(2)], []
    for net, dp in zip(nets, (None, off), strict=True):
        results.append(fit(net, split, terms_for(net), training, 0.3, Rng(0), dp))
    close(*[[p.detach() for p in net.parameters()] for net in nets])
    assert results[1].losses == pytest.approx(results[0].losses, rel=1e-4)
    assert results[1].private == (0.0, 1.0, 3)
    assert (results[0].steps, results[0].examples) == (results[1].steps, results[1].examples)


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_batch_equal_the_whole(mode):
    ends, training = [], Training(steps=4, batch_size=7)
    for physical in (0, 1, 3, 100):
        net = network("cnn")
        dp = DpSgd(
            noise_multiplier=0.4, max_grad_norm=1.0, mode=mode, max_physical_batch_size=physical
        )
        terms = [*terms_for(net), Proximal(net, to_tensors(network("cnn", seed=8)), 0.2)]
        result = fit(net, data(), terms, training, 0.5, Rng(2), dp)
        ends.append(([p.detach() for p in trained(net, terms)], result))
    for end, result in ends[1:]:
        close(end, ends[0][0])
        assert result.examples == ends[0][1].examples
        assert result.losses == pytest.approx(ends[0][1].losses, rel=1e-4)


def to_tensors(net):
    return {k: p.detach().clone() for k, p in net.named_parameters()}


@pytest.mark.parametrize("shape", [(4, 5), (4, 7, 5), (4, 2, 3, 5)], ids=len)
def test_norms_of_linear_layers(shape):
    layer = linear((5, 3), 0)
    x = torch.randn(shape, generator=Rng(0).torch())
    up = torch.randn((*shape[:-1], 3), generator=Rng(1).torch())
    found = linear_norms(layer, [x], up)
    flat_x, flat_up = x.flatten(1, -2) if x.dim() > 2 else x[:, None], up.reshape(4, -1, 3)
    weight = torch.einsum("bti,btj->bij", flat_up, flat_x).flatten(1).norm(dim=1)
    assert torch.allclose(found[layer.weight], weight, rtol=1e-5)
    assert torch.allclose(found[layer.bias], flat_up.sum(1).norm(dim=1), rtol=1e-5)


def test_norms_do_not_round_down_where_rows_cancel():
    # Two rows that nearly agree, with opposite gradients: Gram matrices subtract numbers of 1e7.
    layer = linear((50, 50), 0)
    row = 10 * torch.ones(1, 1, 50)
    x = torch.cat([row, row + 1e-2], dim=1)
    up = torch.cat([row, -row], dim=1)
    truth = torch.einsum("bti,btj->bij", up.double(), x.double()).flatten(1).norm(dim=1).float()
    assert torch.allclose(linear_norms(layer, [x], up)[layer.weight], truth, rtol=1e-3)


def test_a_calculation_by_hand():
    # f(x) = w x, loss (w x - t)^2 / 2 without noise: gradients x (w x - t) = -1, -6; C = 2; n = 2.
    class Squares(Term):
        name, weight = "squares", 1.0

        def __call__(self, batch):
            return (batch.logits[:, 0] - batch.y).square() / 2

    net = BlockNet({"in": nn.Identity()}, nn.Linear(1, 1, bias=False))
    load(net, {"head.weight": torch.zeros(1, 1).numpy()})
    split = Split(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 3]))
    dp = DpSgd(noise_multiplier=0.0, max_grad_norm=2.0)
    fit(net, split, [Squares()], Training(batch_size=2), 0.5, Rng(0), dp)
    assert to_arrays(net)["head.weight"].item() == pytest.approx(0.5 * (1 + 2) / 2, rel=1e-5)
