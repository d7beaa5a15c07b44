"""The one training loop: batches, steps, clipping, masks, and what it refuses."""

import pytest
import torch
from torch import nn

from fedkd.clients.local import Term, batches, fit
from fedkd.clients.terms import HeadSupervised, Supervised
from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.models.book import to_arrays
from fedkd.rng import Rng


def network(seed=0):
    net = BlockNet({"fc1": nn.Linear(4, 5)}, nn.Linear(5, 3))
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=Rng(seed).child(key).torch()))
    return net


def data(n=10):
    x = torch.randn(n, 4, generator=Rng(1).torch())
    return Split(x, torch.arange(n) % 3)


def weights(net):
    return {key: value.tobytes() for key, value in to_arrays(net).items()}


class Seen(Term):
    """Keeps the batches that it is given; its loss is that of the logits."""

    name = "seen"
    weight = 1.0

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        return batch.logits.square().sum(1)


def test_every_epoch_sees_each_example_once_in_another_order():
    seen, split = Seen(), data(10)
    result = fit(network(), split, [seen], Training(epochs=3, batch_size=4), 0.01, Rng(0))
    assert (result.steps, result.examples) == (9, 30)
    assert [len(b.y) for b in seen.batches] == [4, 4, 2] * 3
    orders = [torch.cat([b.index for b in seen.batches[i : i + 3]]) for i in (0, 3, 6)]
    assert all(sorted(order.tolist()) == list(range(10)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    for batch in seen.batches:
        assert torch.equal(batch.x, split.x[batch.index])
        assert torch.equal(batch.y, split.y[batch.index])


def test_steps_replace_epochs_and_go_on_over_their_end():
    seen = Seen()
    training = Training(epochs=1, steps=5, batch_size=4)
    result = fit(network(), data(10), [seen], training, 0.01, Rng(0))
    assert (result.steps, result.examples) == (5, 4 + 4 + 2 + 4 + 4)
    longer = Seen()
    fit(network(), data(10), [longer], Training(epochs=2, batch_size=4), 0.01, Rng(0))
    for ours, theirs in zip(seen.batches, longer.batches, strict=False):
        assert torch.equal(ours.index, theirs.index)


def test_equal_streams_equal_bits_and_other_streams_others():
    def trained(rng):
        net = network()
        fit(net, data(), [Supervised()], Training(batch_size=4), 0.1, rng)
        return weights(net)

    assert trained(Rng(0)) == trained(Rng(0))
    assert trained(Rng(0)) != trained(Rng(0).child("x"))


def test_no_data_or_no_terms_leave_the_network_alone():
    net = network()
    before = weights(net)
    empty = Split(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    assert fit(net, empty, [Supervised()], Training(), 0.1, Rng(0)).steps == 0
    assert fit(net, data(), [], Training(), 0.1, Rng(0)).losses == {}
    assert weights(net) == before


def test_losses_are_means_over_examples_and_over_terms_of_one_name():
    split = data(10)
    net = network()
    with torch.no_grad():
        expected = nn.functional.cross_entropy(net(split.x), split.y).item()
    heads = [nn.Linear(5, 3) for _ in range(2)]
    with torch.no_grad():
        for i, head in enumerate(heads):
            for p in head.parameters():
                p.copy_(torch.randn(p.shape, generator=Rng(9, (i,)).torch()))
        features = net.features(split.x, "fc1")
        each = [nn.functional.cross_entropy(head(features), split.y).item() for head in heads]
    terms = [Supervised(), *(HeadSupervised(head, "fc1", 1.0) for head in heads)]
    # A learning rate of 0 changes nothing, so every batch is judged by the same weights.
    result = fit(net, split, terms, Training(batch_size=3), 0.0, Rng(0))
    assert result.losses["supervised"] == pytest.approx(expected, rel=1e-5)
    assert result.losses["head"] == pytest.approx(sum(each) / 2, rel=1e-5)


def test_weights_scale_terms_but_not_what_is_reported():
    nets, results = [network() for _ in range(2)], []
    for net, weight, lr in ((nets[0], 0.5, 0.2), (nets[1], 1.0, 0.1)):
        training = Training(batch_size=4)
        results.append(fit(net, data(), [Supervised(weight=weight)], training, lr, Rng(0)))
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert results[0].losses["supervised"] == pytest.approx(results[1].losses["supervised"])


def test_heads_are_trained_too_and_a_shared_one_once():
    def moved(share):
        net, head = network(), nn.Linear(5, 3)
        with torch.no_grad():
            for p in head.parameters():
                p.fill_(0.1)
        terms = [HeadSupervised(head, "fc1", 0.5) for _ in range(2 if share else 1)]
        if not share:
            terms[0].weight = 1.0
        fit(net, data(), [Supervised(), *terms], Training(batch_size=4, momentum=0.9), 0.1, Rng(0))
        return head.weight.detach().clone()

    assert torch.allclose(moved(True), moved(False), atol=1e-6)
    assert not torch.allclose(moved(True), torch.full((3, 5), 0.1))


def test_clipping_bounds_the_joint_norm_of_a_step():
    def step(bound):
        net = network()
        before = [p.detach().clone() for p in net.parameters()]
        training = Training(steps=1, batch_size=10, max_grad_norm=bound)
        fit(net, data(), [Supervised(weight=100.0)], training, 1.0, Rng(0))
        after = [p.detach() for p in net.parameters()]
        return torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])

    assert step(0.0).norm() > 5
    assert step(0.5).norm() == pytest.approx(0.5, rel=1e-4)
    assert torch.allclose(step(0.5) / 0.5, step(0.0) / step(0.0).norm(), atol=1e-4)


@pytest.mark.parametrize("lr", [1e30, 3e38])
def test_divergence_is_an_error_with_advice(lr):
    with pytest.raises(RunError, match=r"clients.training.lr .*max_grad_norm"):
        fit(network(), data(), [Supervised()], Training(epochs=3, batch_size=4), lr, Rng(0))


def test_weights_ruined_by_the_last_step_are_noticed():
    class Steep(Term):
        name, weight = "steep", 1.0

        def __call__(self, batch):
            return batch.logits.sum(1) * 1e20

    net = network()
    with pytest.raises(RunError, match="not finite after 1 steps"):
        fit(net, data(), [Steep()], Training(steps=1), 1e30, Rng(0))


def test_features_are_computed_only_where_asked():
    seen = Seen()
    fit(network(), data(), [seen], Training(), 0.1, Rng(0))
    assert seen.batches[0].features == {}
    asked = Seen()
    head = HeadSupervised(nn.Linear(5, 3), "fc1", 1.0)
    fit(network(), data(), [asked, head], Training(), 0.1, Rng(0))
    assert set(asked.batches[0].features) == {"fc1"}


def test_batches_of_images_are_channels_last():
    split = Split(torch.randn(6, 3, 4, 4, generator=Rng(0).torch()), torch.zeros(6).long())
    for x, y, index in batches(split, 4, Rng(0)):
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(x, split.x[index])
        assert len(y) == len(index)
