"""DP-SGD in the one loop: coins, noise, bounds, what is refused, and that no trace is left."""

import copy
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.clients.books.book import opened
from fedkd.clients.client import Client
from fedkd.clients.dp_sgd import DpSgd, dp_problems, poisson, rate_of, steps_of
from fedkd.clients.local import Term, fit
from fedkd.clients.noise import BLOCK, BoxMuller, Keystream, Noise
from fedkd.clients.per_example import ON_MODULES, ON_PARAMETERS, attached
from fedkd.clients.terms import HeadSupervised, Proximal, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import ClientData, Split
from fedkd.errors import ConfigError, RunError
from fedkd.models.base import BlockNet, build
from fedkd.models.book import ModelBook, to_arrays
from fedkd.rng import Rng
from fedkd.types import ClientInfo, Task

MODES = ["hooks", "functorch", "ghost", "bookkeeping"]
IMAGES = Task(name="grey", input_shape=(1, 6, 6), classes=3)


def filled(module, seed=0):
    with torch.no_grad():
        for key, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=Rng(seed).child(key).torch()))
    return module


def network(seed=0):
    return filled(BlockNet({"fc1": nn.Linear(4, 5)}, nn.Linear(5, 3)), seed)


def convolutional():
    return build("cnn", {"channels": [3, 4], "hidden": 5}, IMAGES, Rng(0))


def data(n=10):
    x = torch.randn(n, 4, generator=Rng(1).torch())
    return Split(x, torch.arange(n) % 3)


def weights(net):
    return {key: value.tobytes() for key, value in to_arrays(net).items()}


def moved(net, before):
    return torch.cat(
        [(p.detach() - b).flatten() for p, b in zip(net.parameters(), before, strict=True)]
    )


def clones(net):
    return [p.detach().clone() for p in net.parameters()]


class Logits(Term):
    """The loss of the sum of logits: nothing of interest but its shape."""

    name, weight = "logits", 1.0

    def __init__(self, scale=1.0):
        self.scale, self.batches = scale, []

    def __call__(self, batch):
        self.batches.append(batch)
        return batch.logits.sum(1) * self.scale


class Coupled(Logits):
    name, dp = "coupled", "batch-coupled"


class Scalar(Logits):
    def __call__(self, batch):
        return batch.logits.mean()


# Coins


def test_steps_and_rate():
    assert [steps_of(Training(epochs=2, batch_size=4), n) for n in (0, 1, 4, 5)] == [0, 2, 2, 4]
    assert steps_of(Training(epochs=9, steps=3), 5) == 3
    assert [rate_of(Training(batch_size=4), n) for n in (0, 2, 4, 16)] == [0.0, 1.0, 1.0, 0.25]


def test_every_example_has_its_own_coin_in_every_step():
    n, training = 40, Training(batch_size=10, steps=400)
    drawn = [index for _, _, index in poisson(data(n), training, Rng(3))]
    masks = np.array([np.isin(np.arange(n), index.numpy()) for index in drawn])
    assert masks.shape == (400, 40)
    # 16,000 coins of rate 1/4, and 400 batches of variance n q (1 - q); five standard errors.
    assert masks.mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / masks.size))
    sizes = masks.sum(1)
    assert sizes.var() == pytest.approx(7.5, rel=5 * math.sqrt(2 / 400))
    assert abs(masks.mean(0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 400)
    correlation = np.corrcoef(masks.T) - np.eye(n)
    assert abs(correlation).max() < 5 / math.sqrt(400)
    following = np.corrcoef(masks[:-1].ravel(), masks[1:].ravel())[0, 1]
    assert abs(following) < 5 / math.sqrt(masks.size)


def test_coins_differ_between_streams_and_are_those_of_their_address():
    def drawn(*path):
        batches = poisson(data(30), Training(batch_size=8), Rng(0, path))
        return [tuple(index.tolist()) for _, _, index in batches]

    first = drawn("local", 1, 4)
    assert first == drawn("local", 1, 4)
    assert len(set(first)) == len(first) == 4
    for other in (("local", 2, 4), ("local", 1, 5), ("own", 1, 4)):
        assert not set(first) & set(drawn(*other))


def test_batches_hold_the_drawn_examples_row_major():
    x = torch.randn(20, 1, 4, 4, generator=Rng(0).torch()).to(memory_format=torch.channels_last)
    split = Split(x, torch.arange(20))
    for x, y, index in poisson(split, Training(batch_size=5), Rng(0)):
        assert torch.equal(x, split.x[index])
        assert torch.equal(y, index)
        assert x.stride() == (16, 16, 4, 1) or len(x) < 2


# Noise


@pytest.mark.parametrize("mode", MODES)
def test_noise_has_its_scale_and_is_fresh(mode):
    # Loss without gradient: what moves is noise alone, of std z C / (q n) = 2 * 0.5 / 4.
    net = filled(BlockNet({"fc1": nn.Linear(4, 50)}, nn.Linear(50, 40)))
    dp = DpSgd(noise_multiplier=2.0, max_grad_norm=0.5, mode=mode)
    steps = []
    for seed in (0, 1):
        for _ in range(2):
            before = clones(net)
            training = Training(steps=1, batch_size=4)
            fit(net, data(8), [Logits(0.0)], training, 1.0, Rng(seed), dp)
            steps.append(moved(net, before))
    first, same, other, _ = steps
    assert torch.allclose(first, same, atol=1e-6)
    assert first.std().item() == pytest.approx(0.25, rel=5 / math.sqrt(2 * len(first)))
    assert abs(first.mean()) < 5 * 0.25 / math.sqrt(len(first))
    assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 5 / math.sqrt(len(first))


def test_every_step_has_noise_of_its_own():
    # Two equal steps would double the noise; two fresh ones give sqrt(2).
    net = filled(BlockNet({"fc1": nn.Linear(4, 50)}, nn.Linear(50, 40)))
    before = clones(net)
    dp = DpSgd(noise_multiplier=1.0)
    fit(net, data(8), [Logits(0.0)], Training(steps=9, batch_size=8), 1.0, Rng(0), dp)
    assert moved(net, before).std().item() == pytest.approx(3 / 8, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_same_address_same_bits(mode):
    def end(rng):
        net, head = network(), filled(nn.Linear(5, 3), 2)
        terms = [Supervised(), HeadSupervised(head, "fc1", 0.5)]
        fit(net, data(), terms, Training(epochs=2, batch_size=4), 0.1, rng, DpSgd(1.0, mode=mode))
        return weights(net) | {"own": head.weight.detach().numpy().tobytes()}

    assert end(Rng(0)) == end(Rng(0))
    assert not set(end(Rng(0)).values()) & set(end(Rng(0).child("x")).values())


@pytest.mark.parametrize("mode", MODES)
def test_empty_batches_are_steps_with_noise(mode):
    split = data(2)
    training = Training(steps=20, batch_size=1)
    sizes = [len(y) for _, y, _ in poisson(split, training, Rng(0))]
    assert 0 in sizes
    until = sizes.index(0) + 1
    ends = []
    for steps in (until - 1, until):
        net = network()
        if steps:
            training = Training(steps=steps, batch_size=1)
            result = fit(net, split, [Supervised()], training, 0.1, Rng(0), DpSgd(1.0, mode=mode))
            assert result.examples == sum(sizes[:steps])
        ends.append(clones(net))
    assert all(not torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_without_noise_moves_nothing(mode):
    split, training = data(1000), Training(steps=1, batch_size=1)
    seed = next(s for s in range(50) if not len(next(iter(poisson(split, training, Rng(s))))[1]))
    net = network()
    before = weights(net)
    result = fit(net, split, [Supervised()], training, 1.0, Rng(seed), DpSgd(0.0, 1.0, mode))
    assert (result.steps, result.examples) == (1, 0)
    assert weights(net) == before


def test_a_fit_of_empty_batches_only_reports_no_losses():
    split = data(1000)
    training = Training(steps=1, batch_size=1)
    seed = next(s for s in range(50) if not len(next(iter(poisson(split, training, Rng(s))))[1]))
    result = fit(network(), split, [Supervised()], training, 0.1, Rng(seed), DpSgd(1.0))
    assert (result.steps, result.examples, result.losses) == (1, 0, {})
    assert result.private == (1.0, 0.001, 1)


# Bounds


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("physical", [0, 2])
def test_one_example_more_moves_the_sum_by_at_most_the_bound(mode, physical):
    bound, base, generator = 0.7, data(6), Rng(7).torch()
    dp = DpSgd(0.0, bound, mode, physical)

    def released(split):
        net, head = network(), filled(nn.Linear(5, 3), 2)
        before = [p.detach().clone() for p in (*net.parameters(), *head.parameters())]
        terms = [Supervised(), HeadSupervised(head, "fc1", 3.0)]
        training = Training(steps=1, batch_size=len(split))
        fit(net, split, terms, training, 1.0, Rng(0), dp)
        after = [p.detach() for p in (*net.parameters(), *head.parameters())]
        step = torch.cat([(b - a).flatten() for a, b in zip(after, before, strict=True)])
        return step * len(split)

    without, worst = released(base), 0.0
    for scale in (1e-3, 1.0, 1e3, 1e9, 1e18, 1e30, math.inf, math.nan):
        for label in range(3):
            extra = torch.randn(1, 4, generator=generator) * scale
            x, y = torch.cat([base.x, extra]), torch.cat([base.y, torch.tensor([label])])
            step = (released(Split(x, y)) - without).norm().item()
            assert step <= bound * 1.0001, (scale, label)
            worst = max(worst, step)
    assert worst > 0.99 * bound, "the search found no example that is clipped"


@pytest.mark.parametrize("mode", MODES)
def test_an_example_without_finite_gradient_contributes_nothing(mode):
    split = data(6)
    broken = split.x.clone()
    broken[2] = math.nan
    nets = [network(), network()]
    training = Training(steps=1, batch_size=6)
    dp = DpSgd(0.5, 1.0, mode)
    result = fit(nets[0], Split(broken, split.y), [Supervised()], training, 0.1, Rng(0), dp)
    assert math.isfinite(result.losses["supervised"])
    rest = torch.tensor([0, 1, 3, 4, 5])
    # The divisor is the expected size: 6 with the broken example, 5 without; 0.1 / 6 = lr / 5.
    training = Training(steps=1, batch_size=5)
    fit(nets[1], Split(split.x[rest], split.y[rest]), [Supervised()], training, 0.5 / 6, Rng(0), dp)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_clipping_is_joint_over_terms_and_networks():
    # Two terms of the same gradient and one of twice the weight are one and the same.
    ends = []
    for terms in ([Supervised(), Supervised()], [Supervised(2.0)]):
        net = network()
        before = clones(net)
        dp = DpSgd(0.0, 0.01)
        fit(net, data(6), terms, Training(steps=1, batch_size=6), 1.0, Rng(0), dp)
        ends.append(moved(net, before))
    assert torch.allclose(*ends, atol=1e-7)
    assert ends[0].norm() <= 0.01 * 1.0001


def test_what_is_released_may_be_clipped_again():
    net = network()
    before = clones(net)
    training = Training(steps=1, batch_size=6, max_grad_norm=0.125)
    fit(net, data(6), [Supervised()], training, 1.0, Rng(0), DpSgd(10.0))
    assert moved(net, before).norm().item() == pytest.approx(0.125, rel=1e-3)


# Terms


@pytest.mark.parametrize("mode", MODES)
def test_terms_without_data_are_added_exactly_after_the_noise(mode):
    reference = {"fc1.weight": torch.zeros(5, 4)}
    ends = []
    for mu in (None, 6.0):
        net = network()
        terms = [Logits(1e-3)] + ([Proximal(net, reference, mu)] if mu else [])
        training = Training(steps=1, batch_size=10)
        fit(net, data(), terms, training, 0.1, Rng(0), DpSgd(0.5, 0.1, mode))
        ends.append(dict(net.named_parameters()))
    start = dict(network().named_parameters())
    for key, p in ends[1].items():
        pull = 0.1 * 6.0 * start[key] if key == "fc1.weight" else 0.0
        assert torch.allclose(p, ends[0][key] - pull, atol=1e-6), key


class Elsewhere(Term):
    """Runs the network on inputs of its own; it must not see any of the batch."""

    dp, name, weight = "weights-only", "elsewhere", 1.0

    def __init__(self, net):
        self.net, self.sizes = net, []

    def __call__(self, batch):
        self.sizes.append((len(batch.x), len(batch.y), len(batch.index), len(batch.logits)))
        return self.net(torch.ones(7, 4)).square().mean()


@pytest.mark.parametrize("mode", MODES)
def test_terms_without_data_may_run_the_network_and_see_no_example(mode):
    ends = []
    for extra in (False, True):
        net = network()
        before = clones(net)
        term = Elsewhere(net)
        terms = [Logits(1e-3), *([term] if extra else [])]
        training = Training(steps=1, batch_size=10)
        fit(net, data(), terms, training, 0.1, Rng(0), DpSgd(0.5, 0.1, mode))
        ends.append(moved(net, before))
    truth = network()
    loss = truth(torch.ones(7, 4)).square().mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(truth.parameters()))])
    assert torch.allclose(ends[1] - ends[0], -0.1 * gradient, atol=1e-5, rtol=1e-4)
    assert term.sizes == [(0, 0, 0, 0)]


@pytest.mark.parametrize("mode", MODES)
def test_coupled_terms_and_wrong_shapes_are_refused(mode):
    with pytest.raises(ConfigError, match=r"'coupled' .*batch-coupled.*privacy.unit"):
        fit(network(), data(), [Supervised(), Coupled()], Training(), 0.1, Rng(0), DpSgd(1.0))
    with pytest.raises(ConfigError, match=r"returned the shape \(\) for 10 examples"):
        fit(network(), data(), [Scalar()], Training(), 0.1, Rng(0), DpSgd(1.0, mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_a_parameter_that_no_loss_reaches_gets_its_noise(mode):
    class Deep(Term):
        name, weight = "deep", 1.0

        def __call__(self, batch):
            return batch.features["fc1"].square().sum(1)

        def at(self):
            return frozenset({"fc1"})

    net = network()
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    training = Training(steps=3, batch_size=10)
    fit(net, data(), [Deep()], training, 1.0, Rng(0), DpSgd(0.5, 1.0, mode))
    change = (net.head.weight - before["head.weight"]) * 10 / 0.5
    assert 0.5 < change.std() / math.sqrt(3) < 2


class Twice(nn.Module):
    """One layer that a batch goes through twice."""

    def __init__(self, first):
        super().__init__()
        self.first, self.layer = first, nn.Linear(5, 5)

    def forward(self, x):
        return torch.tanh(self.layer(torch.tanh(self.layer(self.first(x)))))


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_used_twice_has_the_sum_of_both_gradients(mode):
    dp, ends = DpSgd(0.0, 0.05, mode), []
    split = data(4)
    net = filled(BlockNet({"fc1": Twice(nn.Linear(4, 5))}, nn.Linear(5, 3)))
    before = clones(net)
    fit(net, split, [Supervised()], Training(steps=1, batch_size=4), 1.0, Rng(0), dp)
    ends.append(moved(net, before))
    net = filled(BlockNet({"fc1": Twice(nn.Linear(4, 5))}, nn.Linear(5, 3)))
    total = torch.zeros_like(ends[0])
    for i in range(4):
        loss = nn.functional.cross_entropy(net(split.x[i : i + 1]), split.y[i : i + 1])
        found = torch.autograd.grad(loss, list(net.parameters()))
        gradient = torch.cat([g.flatten() for g in found])
        total += gradient * min(1.0, 0.05 / (gradient.norm().item() + 1e-6))
    assert torch.allclose(ends[0], -total / 4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_opacus_does_not_follow_is_refused(mode):
    class Sideways(Term):
        """Uses weights of the network without calling the layer."""

        name, weight = "sideways", 1.0

        def __init__(self, net):
            self.net = net

        def __call__(self, batch):
            return batch.logits.sum(1) + 9 * (batch.x @ self.net.fc1.weight.T).sum(1)

    class Rows(Sideways):
        """Calls a layer on rows that are not the examples of the batch."""

        def __call__(self, batch):
            return batch.logits.sum(1) + self.net(torch.ones(3, 4)).sum()

    class Centred(Sideways):
        """Depends on the whole batch, and does not say so."""

        def __call__(self, batch):
            return (batch.logits - batch.logits.mean(0)).square().sum(1)

    for term in (Sideways, Rows, Centred):
        net = network()
        with pytest.raises(ConfigError, match="does not follow"):
            fit(net, data(), [term(net)], Training(), 0.1, Rng(0), DpSgd(1.0, mode=mode))
        assert traces(net) == []


@pytest.mark.parametrize("mode", MODES)
def test_channels_last_maps_inside_a_network_are_right_or_refused(mode):
    class Turned(nn.Module):
        """A convolution that is handed maps in another format than the network's inputs."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.layer(x.contiguous(memory_format=torch.channels_last))

    net = filled(BlockNet({"c": Turned(), "flat": nn.Flatten()}, nn.Linear(64, 3)))
    split = Split(torch.randn(6, 3, 6, 6, generator=Rng(0).torch()), torch.arange(6) % 3)
    training, dp = Training(steps=1, batch_size=6), DpSgd(0.0, 0.1, mode)
    truth = copy.deepcopy(net)
    total = [torch.zeros_like(p) for p in truth.parameters()]
    for i in range(6):
        loss = nn.functional.cross_entropy(truth(split.x[i : i + 1]), split.y[i : i + 1])
        found = torch.autograd.grad(loss, list(truth.parameters()))
        norm = torch.cat([g.flatten() for g in found]).norm().item()
        for t, g in zip(total, found, strict=True):
            t.add_(g * min(1.0, 0.1 / (norm + 1e-6)) / 6)
    before = clones(net)
    try:
        fit(net, split, [Supervised()], training, 1.0, Rng(0), dp)
    except ConfigError as error:
        assert mode != "functorch"
        assert "does not follow" in str(error)
    else:
        assert torch.allclose(
            moved(net, before), -torch.cat([t.flatten() for t in total]), atol=1e-6
        )


# Networks


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (nn.BatchNorm2d(4), "BatchNorm2d.* mixes"),
        (nn.BatchNorm2d(4, affine=False), "mixes"),
        (nn.BatchNorm1d(4, track_running_stats=False, affine=False), "mixes"),
        (nn.BatchNorm3d(4).requires_grad_(False), "mixes"),
        (nn.SyncBatchNorm(4), "mixes"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "running statistics"),
        (nn.LSTM(4, 4), "LSTM.*nn.Linear"),
        (nn.GRU(4, 4), "GRU.*nn.Linear"),
        (nn.RNN(4, 4), "RNN.*nn.Linear"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention.*nn.Linear"),
        (nn.ReLU(inplace=True), "in place"),
        (Shared(), "used by two layers"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_networks_without_per_example_gradients_are_refused(layer, why):
    net = nn.Sequential(nn.Linear(4, 4), layer)
    for training in (True, False):
        found = dp_problems(net.train(training))
        assert len(found) == 1
        assert re.search(why, found[0])


def test_buffers_are_refused_and_what_is_fine_is_fine():
    layer = nn.Linear(4, 4)
    layer.register_buffer("seen", torch.zeros(1))
    assert "buffer" in dp_problems(nn.Sequential(layer))[0]
    fine = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.ReLU()
    )
    assert dp_problems(fine) == []
    assert dp_problems(nn.LSTM(4, 4).requires_grad_(False)) == []
    for name in ("mlp", "cnn", "resnet8"):
        assert dp_problems(build(name, {}, IMAGES, Rng(0))) == []


def test_a_network_that_is_refused_is_not_trained():
    net = BlockNet({"fc1": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5)}, nn.Linear(5, 3))
    before = clones(net)
    with pytest.raises(ConfigError, match="mixes"):
        fit(net, data(), [Supervised()], Training(), 0.1, Rng(0), DpSgd(1.0))
    assert moved(net, before).norm() == 0
    assert net.norm.num_batches_tracked == 0


def test_networks_that_share_some_layers_are_refused():
    net = network()
    inner = HeadSupervised(net.head, "fc1", 1.0)
    fit(net, data(), [Supervised(), inner], Training(batch_size=4), 0.1, Rng(0), DpSgd(1.0))
    across = HeadSupervised(BlockNet({"new": nn.Linear(5, 5)}, net.head), "fc1", 1.0)
    with pytest.raises(ConfigError, match="share some of their layers"):
        fit(net, data(), [Supervised(), across], Training(), 0.1, Rng(0), DpSgd(1.0))
    assert traces(net) == []


# No trace


def traces(module):
    """What Opacus or we left on a network."""
    found = [m for p in module.parameters() for m in ON_PARAMETERS if m in vars(p)]
    for layer in module.modules():
        found += [m for m in (*ON_MODULES, "autograd_grad_sample_hooks") if m in vars(layer)]
        found += list(layer._forward_hooks.values()) + list(layer._backward_hooks.values())
    return found + [p.grad for p in module.parameters() if p.grad is not None]


class Breaks(Term):
    """Raises in the third batch, after its forward pass."""

    name, weight = "breaks", 1.0

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("broken on purpose")
        return batch.logits.sum(1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("term", [Supervised, Breaks])
def test_networks_are_as_before_but_for_their_weights(mode, term):
    net = convolutional()
    strides = [p.stride() for p in net.parameters()]
    split = Split(torch.randn(9, 1, 6, 6, generator=Rng(0).torch()), torch.arange(9) % 3)
    training = Training(epochs=4, batch_size=4, frozen=("conv1",))
    before = weights(net)
    if mode == "bookkeeping":
        with opened([net], 1.0):
            assert traces(net)
    else:
        with attached([net], mode, 1.0):
            assert traces(net)
            assert all(p.is_contiguous() for p in net.parameters())
    assert weights(net) == before
    try:
        fit(net, split, [term()], training, 0.1, Rng(0), DpSgd(1.0, mode=mode))
    except RuntimeError as error:
        assert term is Breaks, error
    assert traces(net) == []
    assert [p.stride() for p in net.parameters()] == strides
    assert all(p.requires_grad for p in net.parameters())
    changed = {k for k, v in weights(net).items() if v != before[k]}
    assert changed == {k for k in before if not k.startswith("conv1")}
    # Plain code goes on as if nothing had been there.
    ends = [copy.deepcopy(net), convolutional()]
    with torch.no_grad():
        for a, b in zip(net.parameters(), ends[1].parameters(), strict=True):
            b.copy_(a)
    for end in ends:
        fit(end, split, [Supervised()], Training(batch_size=4), 0.1, Rng(0))
    assert weights(ends[0]) == weights(ends[1])


@pytest.mark.parametrize("mode", MODES)
def test_what_an_earlier_batch_left_is_not_released(mode):
    # The head is run in every step and never used in the loss: its marks must not pile up.
    net = network()

    class Sometimes(Term):
        name, weight = "sometimes", 1.0

        def __init__(self):
            self.calls = 0

        def __call__(self, batch):
            self.calls += 1
            if self.calls % 2:
                return batch.features["fc1"].sum(1)
            return batch.logits.sum(1)

        def at(self):
            return frozenset({"fc1"})

    split, dp = data(6), DpSgd(0.0, 1e6, mode)
    fit(net, split, [Sometimes()], Training(steps=2, batch_size=6), 0.1, Rng(0), dp)
    truth = network()
    for step in range(2):
        logits, features = truth.forward_with_features(split.x, ["fc1"])
        loss = (logits if step else features["fc1"]).sum(1).mean()
        found = torch.autograd.grad(loss, list(truth.parameters()), allow_unused=True)
        with torch.no_grad():
            for p, g in zip(truth.parameters(), found, strict=True):
                p.sub_(0 if g is None else 0.1 * g)
    for a, b in zip(net.parameters(), truth.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


# Frozen blocks


@pytest.mark.parametrize("dp", [None, DpSgd(1.0)], ids=["plain", "private"])
def test_frozen_blocks_stay_and_are_free_again(dp):
    net = network()
    before = weights(net)
    training = Training(batch_size=4, frozen=("fc1",))
    fit(net, data(), [Supervised()], training, 0.1, Rng(0), dp)
    changed = {k for k, v in weights(net).items() if v != before[k]}
    assert changed == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in net.parameters())
    with pytest.raises(ConfigError, match=r"unknown block 'fc2' in clients.training.frozen"):
        fit(net, data(), [Supervised()], Training(frozen=("fc2",)), 0.1, Rng(0), dp)
    everything = Training(frozen=("fc1", "head"))
    with pytest.raises(ConfigError, match="nothing to train"):
        fit(net, data(), [Supervised()], everything, 0.1, Rng(0), dp)
    head = filled(nn.Linear(5, 3))
    seen = head.weight.detach().clone()
    terms = [HeadSupervised(head, "fc1", 1.0)]
    fit(net, data(), terms, everything, 0.1, Rng(0), dp)
    assert not torch.equal(head.weight, seen)
    net.fc1.requires_grad_(False)
    fit(net, data(), [Supervised()], training, 0.1, Rng(0), dp)
    assert not net.fc1.weight.requires_grad


# Options and clients


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier = -1"),
        ({"noise_multiplier": math.nan}, "noise_multiplier = nan"),
        ({"noise_multiplier": math.inf}, "noise_multiplier = inf"),
        ({"noise_multiplier": 1.0, "max_grad_norm": math.inf}, "units of max_grad_norm"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "above 0"),
        ({"noise_multiplier": 1.0, "max_grad_norm": math.nan}, "above 0"),
        ({"noise_multiplier": 1.0, "mode": "ew"}, "'ew'"),
        ({"noise_multiplier": 1.0, "max_physical_batch_size": -1}, "max_physical"),
    ],
)
def test_impossible_options_are_refused(given, why):
    with pytest.raises(ConfigError, match=why):
        DpSgd(**given)


def test_no_data_cost_nothing():
    empty = Split(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    net = network()
    before = weights(net)
    result = fit(net, empty, [Supervised()], Training(), 0.1, Rng(0), DpSgd(1.0))
    assert (result.steps, result.private) == (0, None)
    assert weights(net) == before


@pytest.mark.parametrize("mode", MODES)
def test_divergence_is_an_error(mode):
    with pytest.raises(RunError, match="diverged"):
        fit(
            network(),
            data(),
            [Supervised()],
            Training(epochs=3, weight_decay=1.0),
            3e38,
            Rng(0),
            DpSgd(1.0, mode=mode),
        )


def client(dp=None, round_=1, id_=0):
    task = Task(name="t", input_shape=(4,), classes=3)
    split, none = data(10), data(0)
    return Client(
        info=ClientInfo(id=id_, examples=10, model="mlp"),
        data=ClientData(split, none, none),
        state={},
        book=ModelBook(task, {"mlp": ("mlp", {"hidden": [5]})}, 0),
        training=Training(batch_size=4, epochs=2),
        seed=0,
        round=round_,
        rounds=3,
        dp=dp,
    )


def test_a_client_notes_what_its_own_data_paid_and_public_data_cost_nothing():
    one = client(DpSgd(1.5))
    assert one.fit(one.model(), [Supervised()]).private == (1.5, 0.4, 6)
    public = data(8)
    assert one.fit(one.model(), [Supervised()], "public", data=public).private is None
    assert one.fit(one.model(), [Supervised()], "own", data=one.data.train).private is not None
    relabelled = Split(one.data.train.x, one.data.train.y)
    assert one.fit(one.model(), [Supervised()], "again", data=relabelled).private is not None
    assert one.spent == [(1.5, 0.4, 6)] * 3
    plain = client()
    plain.fit(plain.model(), [Supervised()])
    assert plain.spent == []


def test_clients_and_rounds_have_coins_and_noise_of_their_own():
    ends = []
    for round_, id_ in ((1, 0), (2, 0), (1, 1)):
        one = client(DpSgd(1.0), round_, id_)
        net = one.model()
        one.fit(net, [Supervised()])
        ends.append(weights(net))
    assert not set(ends[0].values()) & set(ends[1].values())
    assert not set(ends[0].values()) & set(ends[2].values())


# Where noise comes from


def drawn(mode, *sizes, address="x", std=2.0):
    noise, found = Noise(Rng(0).child(address), std, mode), [torch.zeros(n, 3) for n in sizes]
    for tensor in found:
        noise.add([tensor])
    return torch.cat(found)


def test_hooks_and_their_kin_draw_the_normal_numbers_of_numpy():
    expected = Rng(0).child("x").numpy().standard_normal((12, 3), dtype=np.float32)
    for mode in ("hooks", "functorch", "ghost"):
        assert torch.equal(drawn(mode, 5, 7), 2 * torch.from_numpy(expected))


@pytest.mark.parametrize("mode", ["hooks", "bookkeeping", "auto"])
def test_noise_is_normal_and_that_of_its_address(mode):
    x = drawn(mode, 40_001, 3).flatten().double()
    assert torch.equal(drawn(mode, 40_001, 3).flatten().double(), x)
    other = drawn(mode, 40_001, 3, address="y").flatten().double()
    n = len(x)
    for z in (x / 2, other / 2):
        assert abs(z.mean()) < 5 / math.sqrt(n)
        assert z.var().item() == pytest.approx(1.0, abs=5 * math.sqrt(2 / n))
        # By the normal distribution function: half a percent is 1.73 / sqrt(n), never by chance.
        places = (torch.erf(z.sort().values / math.sqrt(2)) + 1) / 2
        assert (places - torch.arange(n) / n).abs().max() < 0.005
    assert abs(torch.corrcoef(torch.stack([x, other]))[0, 1]) < 5 / math.sqrt(n)
    # Sines and cosines of one pair, of blocks one after another, and neighbours.
    for apart in (1, BLOCK // 2, BLOCK):
        pairs = torch.corrcoef(torch.stack([x[apart:], x[:-apart]]))
        squares = torch.corrcoef(torch.stack([x[apart:], x[:-apart]]).square())
        assert abs(pairs[0, 1]) < 5 / math.sqrt(n)
        assert abs(squares[0, 1]) < 5 / math.sqrt(n)


def test_the_tails_of_box_muller():
    class Words:
        """The same bits always; they are read as whole numbers with a sign."""

        def __init__(self, high, low):
            self.pair = high, low

        def write(self, out):
            half = len(out) // 2
            numbers = np.frombuffer(out, np.int32)
            numbers[: half // 4], numbers[half // 4 :] = self.pair

    least, most = -(2**31), 2**31 - 1
    # Nought is the rarest, and the largest are 1 after rounding.
    cases = [((0, 0), 9.42), ((0, 1), 9.30), ((least, least), 0.0), ((most, most), 0.0)]
    for words, expected in cases:
        source, out = BoxMuller(Rng(0)), torch.empty(3)
        source._bits = Words(*words)
        source.fill(out)
        assert out.isfinite().all()
        # The angle is made of the first number again.
        turn = math.hypot(out[0].item(), out[2].item())
        assert turn == pytest.approx(expected, abs=0.01)


def test_bits_are_those_of_aes_in_counter_mode():
    # NIST SP 800-38A, F.5.1, encrypts its first counter block to this; ours begins at nought.
    class Address:
        key = int("2b7e151628aed2a6abf7158809cf4f3c", 16)

    bits, out = Keystream(Address()), bytearray(40)
    bits.write(memoryview(out)[:3])
    bits.write(memoryview(out)[3:])
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    block = Cipher(algorithms.AES(Address.key.to_bytes(16, "big")), modes.ECB()).encryptor()
    counters = b"".join(i.to_bytes(16, "big") for i in range(3))
    assert bytes(out) == block.update(counters)[:40]


def test_numbers_do_not_depend_on_how_many_are_asked_for_together():
    # Of a stretch that is asked for again and again, and of one that is longer than a block.
    source, other = BoxMuller(Rng(3)), BoxMuller(Rng(3))
    parts, whole = torch.empty(BLOCK), torch.empty(2 * BLOCK + 3)
    other.fill(whole)
    for start in (0, BLOCK):
        source.fill(parts)
        assert torch.equal(parts, whole[start : start + BLOCK])
    rest = torch.empty(3)
    source.fill(rest)
    assert torch.equal(rest, whole[2 * BLOCK :])
