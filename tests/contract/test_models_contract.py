"""What every registered model promises, on three tasks; a new model is covered by its name."""

import functools

import pytest
import torch
from torch import nn

from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet, block_of, build
from fedkd.models.registries import models
from fedkd.rng import Rng
from fedkd.types import Task

TEXT = ("gpt-tiny", "lstm")
"""Models that read rows of text: see test_sequence_models.py."""
TASKS = {
    shape: Task(name="x".join(map(str, shape)), input_shape=shape, classes=7)
    for shape in [(1, 28, 28), (3, 32, 32), (1, 8, 8)]
}
TOO_SMALL = {("lenet", (1, 8, 8))}
CASES = [
    pytest.param(name, task, id=f"{name}-{task.name}")
    for name in models.names()
    if name not in TEXT
    for shape, task in TASKS.items()
    if (name, shape) not in TOO_SMALL
]
every = pytest.mark.parametrize(("name", "task"), CASES)


@functools.cache
def network(name: str, task: Task) -> BlockNet:
    return build(name, {}, task, Rng(0))


def inputs(task: Task, n: int = 4) -> torch.Tensor:
    return torch.randn(n, *task.input_shape, generator=Rng(1).torch())


@pytest.mark.parametrize(("name", "shape"), sorted(TOO_SMALL))
def test_images_too_small_are_refused(name, shape):
    with pytest.raises(ConfigError, match="at least"):
        build(name, {}, TASKS[shape], Rng(0))


@every
def test_structure(name, task):
    net = network(name, task)
    assert net.names == (*net.block_names, "head")
    assert [child for child, _ in net.named_children()] == list(net.names)
    assert {block_of(key) for key in net.state_dict()} <= set(net.names)
    assert models.summary(name).endswith(".")


@every
def test_forward_and_features_agree(name, task):
    net, x = network(name, task), inputs(task)
    with torch.no_grad():
        logits, features = net.forward_with_features(x, net.names)
        assert logits.shape == (4, task.classes)
        assert torch.equal(logits, net(x))
        assert torch.equal(features["head"], logits)
        assert list(features) == list(net.names)
        for at in net.names:
            assert features[at].shape == (4, net.feature_size(task, at))
            assert torch.equal(features[at], net.features(x, at))
        assert net.forward_with_features(x, [])[1] == {}


@every
def test_every_parameter_gets_a_gradient(name, task):
    net = build(name, {}, task, Rng(0))
    labels = torch.arange(8) % task.classes
    nn.functional.cross_entropy(net(inputs(task, 8)), labels).backward()
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert silent == []


@every
def test_examples_do_not_mix(name, task):
    net, x = network(name, task), inputs(task)
    with torch.no_grad():
        alone = torch.cat([net(x[i : i + 1]) for i in range(len(x))])
        assert torch.allclose(net(x), alone, atol=1e-5)


@every
def test_legal_under_dp_sgd(name, task):
    net = network(name, task)
    assert list(net.buffers()) == []
    assert [m for m in net.modules() if getattr(m, "inplace", False)] == []
    assert [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] == []
    assert len(list(net.parameters())) == len(list(net.named_parameters(remove_duplicate=False)))


@every
def test_state_round_trip(name, task):
    net, x = network(name, task), inputs(task)
    other = build(name, {}, task, Rng(99))
    assert not torch.equal(other(x), net(x))
    state = {key: torch.from_numpy(v.numpy().copy()) for key, v in net.state_dict().items()}
    other.load_state_dict(state)
    assert torch.equal(other(x), net(x))


@every
def test_initial_parameters_are_addressed(name, task):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build(name, {}, task, Rng(1).child("model"))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again = build(name, {}, task, Rng(1).child("model")).state_dict()
    other = build(name, {}, task, Rng(2).child("model")).state_dict()
    for key, value in first.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, again[key])
        assert torch.isfinite(value).all()
        constant = (value == value.flatten()[0]).all()
        assert constant or not torch.equal(value, other[key])


@every
def test_forward_and_backward_are_deterministic(name, task):
    net, x = build(name, {}, task, Rng(0)), inputs(task)

    def gradients() -> list[torch.Tensor]:
        logits, features = net.forward_with_features(x, net.names)
        loss = logits.square().sum() + sum(f.square().mean() for f in features.values())
        return [logits, *torch.autograd.grad(loss, list(net.parameters()))]

    torch.use_deterministic_algorithms(True)
    try:
        first, second = gradients(), gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every
def test_the_loss_can_be_fitted(name, task):
    net = build(name, {}, task, Rng(0))
    x, labels = inputs(task, 14), torch.arange(14) % task.classes
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_small_cnn_has_about_two_hundred_thousand_parameters():
    net = build("cnn", {}, Task(name="fashion", input_shape=(1, 28, 28), classes=10), Rng(0))
    assert 180_000 <= sum(p.numel() for p in net.parameters()) <= 230_000
