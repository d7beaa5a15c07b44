"""Networks of token sequences: structure, causality, and an LSTM that is torch's."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet, build, pool
from fedkd.models.gpt import CausalAttention
from fedkd.models.initial import initialise
from fedkd.models.lstm import Lstm
from fedkd.rng import Rng
from fedkd.types import Task

TEXT = Task(
    name="text",
    input_shape=(9,),
    classes=7,
    class_names=("", *"abcdef"),
    bounds=(0, 6),
    sequence=True,
)
IMAGES = Task(name="images", input_shape=(1, 8, 8), classes=3)
TABLE = Task(name="table", input_shape=(9,), classes=7)
SMALL = {
    "lstm": {"width": 5, "hidden": 6, "depth": 2},
    "gpt-tiny": {"width": 8, "depth": 2, "heads": 2, "hidden": 12},
}
every = pytest.mark.parametrize("name", list(SMALL))


def network(name: str, seed: int = 0) -> BlockNet:
    return build(name, SMALL[name], TEXT, Rng(seed))


def tokens(n: int = 4, length: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 7, (n, length), generator=Rng(seed).torch())


def loud(net: nn.Module) -> nn.Module:
    """Parameters large enough that a wrong formula cannot hide."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=Rng(5).child(name).torch()) / 2)
    return net


@every
def test_structure_and_logits_at_every_place(name):
    net = network(name)
    block = "lstm" if name == "lstm" else "block"
    assert net.names == ("embed", f"{block}1", f"{block}2", "head")
    assert net(tokens()).shape == (4, 9, 7)
    assert [n for n, _ in net.named_buffers()] == []
    one, again, other = (dict(network(name, s).named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("lstm", 130e3, 145e3), ("gpt-tiny", 110e3, 130e3)]
)
def test_sizes_by_default(name, least, most):
    task = Task(name="text", input_shape=(80,), classes=100, sequence=True)
    assert least < sum(p.numel() for p in build(name, {}, task, Rng(0)).parameters()) < most


@every
@pytest.mark.parametrize("task", [IMAGES, TABLE], ids=lambda t: t.name)
def test_what_is_no_text_is_refused(name, task):
    with pytest.raises(ConfigError, match=rf"'{name}' needs sequences of tokens.*'{task.name}'"):
        build(name, {}, task, Rng(0))


def test_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="width = 10 is not a multiple of heads = 4; use 8"):
        build("gpt-tiny", {"width": 10}, TEXT, Rng(0))


@every
def test_no_place_sees_what_comes_after_it_and_every_later_one_sees_it(name):
    net, x = loud(network(name)), tokens()
    with torch.no_grad():
        before = net(x)
        for t in range(9):
            changed = x.clone()
            changed[:, t] = (x[:, t] + 1) % 7
            after = net(changed)
            assert torch.allclose(after[:, :t], before[:, :t], atol=1e-6)
            moved = (after - before).abs().amax((0, 2))[t:]
            assert float(moved.min()) > 1e-5


@every
def test_a_beginning_gives_the_beginning(name):
    net, x = network(name), tokens()
    with torch.no_grad():
        assert torch.allclose(net(x[:, :4]), net(x)[:, :4], atol=1e-6)
        assert torch.allclose(net(x[:, :1]), net(x)[:, :1], atol=1e-6)


def test_a_text_longer_than_the_places_is_refused_but_not_by_the_lstm():
    with pytest.raises(ConfigError, match="learned 9 places, but was given a sequence of 10"):
        network("gpt-tiny")(tokens(length=10))
    assert network("lstm")(tokens(length=10)).shape == (4, 10, 7)


@every
def test_examples_do_not_mix_and_none_is_no_error(name):
    net, x = loud(network(name)), tokens()
    alone = torch.cat([net(x[i : i + 1]) for i in range(4)])
    assert torch.allclose(net(x), alone, atol=1e-5)
    assert net(x[:0]).shape == (0, 9, 7)
    net(x[:0]).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


@every
def test_numbers_of_any_type_are_tokens_and_features_follow(name):
    net, x = network(name), tokens()
    with torch.no_grad():
        assert torch.equal(net(x.float()), net(x)) and torch.equal(net(x.int()), net(x))
        logits, features = net.forward_with_features(x, net.names)
        assert torch.equal(logits, net(x))
        for at in net.names:
            assert features[at].shape == (4, net.feature_size(TEXT, at))
        deep = net.block_names[1]
        assert torch.equal(net.behind(deep)(net.raw_features(x, deep)), logits)
        assert torch.equal(features["head"], pool(logits))


@every
def test_training_and_evaluation_agree_and_are_deterministic(name):
    net, x = network(name), tokens()
    with torch.no_grad():
        quiet = net(x)
    torch.use_deterministic_algorithms(True)
    try:
        found = [
            [out := net(x), *torch.autograd.grad(out.square().sum(), list(net.parameters()))]
            for _ in range(2)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(found[0][0], quiet)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(bool(g.any()) for g in found[0][1:])


@every
def test_the_loss_can_be_fitted(name):
    net, x = build(name, {}, TEXT, Rng(0)), tokens(12)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = functional.cross_entropy(net(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def theirs_for(ours: Lstm, inputs: int, hidden: int) -> nn.LSTM:
    theirs = nn.LSTM(inputs, hidden, batch_first=True).to(ours.read.weight.dtype)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.read.weight)
        theirs.weight_hh_l0.copy_(ours.recall.weight)
        theirs.bias_ih_l0.copy_(ours.read.bias)
        theirs.bias_hh_l0.zero_()
    return theirs


@pytest.mark.parametrize("length", [1, 2, 11])
def test_the_lstm_and_its_gradients_are_torchs(length):
    ours = loud(Lstm(3, 5).double())
    theirs = theirs_for(ours, 3, 5)
    x, pull = (
        torch.randn(4, length, n, generator=Rng(n).torch(), dtype=torch.float64) for n in (3, 5)
    )
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [ours(inputs[0]), theirs(inputs[1])[0]]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), outputs[1], rtol=0, atol=1e-12)
    for out in outputs:
        (out * pull + out.square()).sum().backward()
    pairs = [
        (inputs[0].grad, inputs[1].grad),
        (ours.read.weight.grad, theirs.weight_ih_l0.grad),
        (ours.recall.weight.grad, theirs.weight_hh_l0.grad),
        (ours.read.bias.grad, theirs.bias_ih_l0.grad),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
        assert bool(one.any()) or (length == 1 and one is ours.recall.weight.grad)


def test_the_gradient_of_the_lstm_is_that_of_differences():
    layer = loud(Lstm(2, 3).double())
    x = torch.randn(2, 4, 2, generator=Rng(3).torch(), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))


def test_part_of_an_lstm_can_be_frozen():
    layer, x = Lstm(3, 4), torch.randn(2, 5, 3, generator=Rng(0).torch())
    initialise(layer, Rng(0))
    (full,) = torch.autograd.grad(layer(x).square().sum(), [layer.read.weight])
    layer.recall.requires_grad_(False)
    (part,) = torch.autograd.grad(layer(x).square().sum(), [layer.read.weight])
    assert torch.equal(full, part)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_causal_attention_is_torchs_with_a_mask():
    ours, theirs = CausalAttention(12, heads=3), nn.MultiheadAttention(12, 3, batch_first=True)
    loud(ours)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.mix_in.weight)
        theirs.in_proj_bias.copy_(ours.mix_in.bias)
        theirs.out_proj.load_state_dict(ours.mix_out.state_dict())
        x = torch.randn(2, 5, 12, generator=Rng(1).torch())
        mask = torch.ones(5, 5, dtype=torch.bool).triu(1)
        expected = theirs(x, x, x, attn_mask=mask)[0]
        torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
