"""Networks cast from a prototype: the same as copies, and nothing shared that can change."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedkd.models.base import BlockNet
from fedkd.models.book import ModelBook, load, to_arrays
from fedkd.models.mould import Mould, fill
from fedkd.types import Task

IMAGES = Task(name="images", input_shape=(3, 8, 8), classes=4)
TEXT = Task(name="text", input_shape=(6,), classes=9, sequence=True)
NAMES = {"mlp": IMAGES, "cnn": IMAGES, "vit-tiny": IMAGES, "gpt-tiny": TEXT, "lstm": TEXT}


def book(name, dtype=torch.float32):
    options = {"patch": 4} if name == "vit-tiny" else {}
    return ModelBook(NAMES[name], {name: (name, options)}, 0, dtype)


def inputs(task):
    if task.sequence:
        return torch.arange(12).reshape(2, 6) % 9
    return torch.linspace(-1, 1, 2 * 192).reshape(2, 3, 8, 8)


def reachable(value):
    """The changeable objects below a value."""
    if isinstance(value, nn.Module):
        yield from reachable(vars(value))
    elif isinstance(value, dict | list | set | torch.Tensor):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            if not isinstance(value, torch.Tensor):
                yield from reachable(inner)


@pytest.mark.parametrize("name", NAMES)
def test_a_cast_network_is_a_copy_that_shares_nothing(name, monkeypatch):
    made = book(name)
    prototype = made._mould(name).prototype if made.initial(name) else None
    expected = copy.deepcopy(prototype)
    monkeypatch.setattr(copy, "deepcopy", None)
    one, other = made.make(name), made.make(name)
    x = inputs(NAMES[name])
    assert torch.equal(one(x), expected(x))
    assert repr(one) == repr(expected)
    for mine, theirs in zip(one.modules(), expected.modules(), strict=True):
        assert vars(mine).keys() == vars(theirs).keys()
    for mine, theirs in zip(one.parameters(), expected.parameters(), strict=True):
        assert type(mine) is nn.Parameter
        assert mine.stride() == theirs.stride()
        assert mine.requires_grad
    apart = [{id(v) for v in reachable(net)} for net in (one, other, prototype)]
    assert not (apart[0] & apart[1] or apart[0] & apart[2])
    with torch.no_grad():
        for p in one.parameters():
            p.zero_()
    one.eval().register_forward_hook(lambda *_: None)
    assert torch.equal(other(x), expected(x))
    assert other.training
    assert not other._forward_hooks


def test_a_cast_network_can_be_differentiated_and_moved():
    net = book("cnn").make("cnn").to(torch.float64)
    net(inputs(IMAGES).double()).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_sources_win_in_turn_and_foreign_keys_are_ignored():
    made = book("mlp")
    first = {k: np.full_like(v, 1) for k, v in made.initial("mlp").items()}
    bias = np.full((4,), 2, np.float32)
    bias.flags.writeable = False
    net = made.make("mlp", first, {"head.bias": bias, "other": bias})
    assert to_arrays(net)["head.bias"].tolist() == [2, 2, 2, 2]
    assert (to_arrays(net)["head.weight"] == 1).all()
    with torch.no_grad():
        net.get_parameter("head.bias").add_(1)
    assert bias.tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match=r"'head.bias' has shape \(3,\), expected \(4,\)"):
        made.make("mlp", {"head.bias": np.zeros(3, np.float32)})


@pytest.mark.parametrize("name", ["cnn", "lstm"])
def test_networks_of_another_type(name):
    double, single = book(name, torch.float64), book(name)
    net = double.make(name, single.initial(name))
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    for key, value in double.initial(name).items():
        assert value.dtype == np.float64
        assert np.array_equal(value, single.initial(name)[key])
    x = inputs(NAMES[name])
    found = net(x if NAMES[name].sequence else x.double())
    assert found.dtype == torch.float64
    assert torch.allclose(found.float(), single.make(name)(x), atol=1e-5)


class Scaled(nn.Module):
    """Has attributes of its own: some can be made anew, some only be copied."""

    def __init__(self, aside):
        super().__init__()
        self.inner, self.scales, self.aside = nn.Linear(2, 2), [1, 2], aside

    def forward(self, x):
        return self.inner(x) * self.scales[1]


@pytest.mark.parametrize("aside", [(), {}, {"a": 1}, [nn.Linear(1, 1)], [[1]]])
def test_own_attributes_are_not_shared_whatever_they_are(aside):
    net = BlockNet({"scaled": Scaled(aside)}, nn.Linear(2, 2))
    mould, values = Mould(net), to_arrays(net)
    one, other = mould.cast(values), mould.cast(values)
    one.scaled.scales[1] = 0
    assert other.scaled.scales == [1, 2]
    assert isinstance(aside, tuple) or one.scaled.aside is not other.scaled.aside
    assert type(one.scaled.aside) is type(aside)


def test_hooks_buffers_and_modules_used_twice_are_copied_as_ever():
    twice = nn.ReLU()
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, given, found: found + module.bias)
    blocks = {"a": nn.Sequential(hooked, twice), "b": nn.Sequential(nn.BatchNorm1d(2), twice)}
    net = BlockNet(blocks, nn.Linear(2, 2))
    made = Mould(net).cast(to_arrays(net))
    assert made.a[1] is made.b[1]
    x = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    assert torch.equal(made(x), copy.deepcopy(net)(x))
    assert made.b[0].running_mean.data_ptr() != net.b[0].running_mean.data_ptr()
    assert made.b[0].num_batches_tracked == 1


def test_arrays_go_in_and_out_of_any_memory_format():
    conv = nn.Conv2d(3, 4, 5).to(memory_format=torch.channels_last)
    value = np.arange(300, dtype=np.float32).reshape(4, 3, 5, 5)
    load(conv, {"weight": value[::-1], "unknown": value})
    found = to_arrays(conv)["weight"]
    assert np.array_equal(found, value[::-1])
    assert found.flags.c_contiguous
    assert found.flags.writeable
    found[:] = 0
    assert conv.weight.abs().sum() > 0
    half = torch.zeros(2, dtype=torch.bfloat16)
    fill(half, "half", np.array([1.0, 2.0]))
    assert half.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameters_lie_apart_and_change_one_by_one(dtype):
    conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    conv.register_parameter("none", nn.Parameter(torch.zeros(0, 2)))
    net = BlockNet({"conv": conv}, nn.Linear(5, 2)).to(dtype)
    values = {key: p.detach().double().numpy() for key, p in net.named_parameters()}
    mould = Mould(net)
    for made in (mould.cast(values), mould.cast(values)):
        assert made.conv.weight.stride() == net.conv.weight.stride()
        assert all(map(torch.equal, made.parameters(), net.parameters()))
        places = sorted((p.data_ptr(), p.nbytes) for p in made.parameters() if p.numel())
        assert all(at % 64 == 0 for at, _ in places)
        assert all(at + n <= after for (at, n), (after, _) in pairwise(places))
        before = {key: p.detach().clone() for key, p in made.named_parameters()}
        versions = {key: p._version for key, p in made.named_parameters()}
        with torch.no_grad():
            made.head.bias.add_(1)
        changed = [key for key, p in made.named_parameters() if p._version != versions[key]]
        assert changed == ["head.bias"]
        for key, p in made.named_parameters():
            assert torch.equal(p, before[key] + (key == "head.bias"))


def test_arrays_are_those_of_the_named_parameters_in_their_order():
    net = BlockNet({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 2))}, nn.Linear(2, 2))
    net.b[0].weight = net.a.weight
    net.b.add_module("again", net.a)
    net.a.register_parameter("absent", None)
    named = dict(net.named_parameters())
    found = to_arrays(net)
    assert list(found) == list(named)
    assert all(np.array_equal(found[key], value.detach()) for key, value in named.items())
