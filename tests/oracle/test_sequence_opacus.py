"""Per-example gradients of token networks, in each mode, against autograd one example at a time."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedkd.clients.dp_sgd import dp_problems
from fedkd.clients.per_example import attached
from fedkd.models.base import BlockNet, build
from fedkd.rng import Rng
from fedkd.types import Task

TEXT = Task(name="text", input_shape=(8,), classes=7, class_names=("", *"abcdef"), sequence=True)
SMALL = {
    "lstm": {"width": 5, "hidden": 6, "depth": 2},
    "gpt-tiny": {"width": 8, "depth": 2, "heads": 2, "hidden": 12},
}
LENGTHS = [8, 5, 1, 7, 8, 2]

every = pytest.mark.parametrize("name", list(SMALL))
# Opacus' functorch asks for mixed precision where an input is a whole number; torch declines.
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")


def network(name: str) -> BlockNet:
    net = build(name, SMALL[name], TEXT, Rng(0))
    with torch.no_grad():
        for key, p in net.named_parameters():
            p.copy_(torch.randn(p.shape, generator=Rng(4).child(key).torch()) / 3)
    return net


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths: token 0 and label -1 behind their end."""
    rows = torch.randint(1, 7, (len(LENGTHS), 9), generator=Rng(1).torch())
    for row, length in zip(rows, LENGTHS, strict=True):
        row[length + 1 :] = 0
    y = rows[:, 1:].clone()
    y[y == 0] = -1
    return rows[:, :-1], y


def losses(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens of an example, and something of every other place."""
    logits = net(x)
    each = functional.cross_entropy(logits.transpose(1, 2), y, ignore_index=-1, reduction="none")
    return each.sum(1) / (y >= 0).sum(1) + 0.01 * logits.square().mean((1, 2))


def alone(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    parameters = list(net.parameters())
    found = [
        torch.autograd.grad(losses(net, x[i : i + 1], y[i : i + 1]).sum(), parameters)
        for i in range(len(x))
    ]
    return [torch.stack(each) for each in zip(*found, strict=True)]


@every
def test_nothing_speaks_against_dp_sgd(name):
    assert dp_problems(network(name)) == []


@every
@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_gradients_of_examples_are_those_of_autograd(name, mode):
    net, (x, y) = network(name), text()
    truth = alone(net, x, y)
    with attached([net], mode, 1.0) as gradients:
        for size in (6, 1, 6):
            gradients.clear()
            assert gradients.backward(losses(net, x[:size], y[:size])).all()
            for (key, p), expected in zip(net.named_parameters(), truth, strict=True):
                found = p.grad_sample
                assert torch.allclose(found, expected[:size], atol=1e-5, rtol=1e-4), key
                assert bool(expected.any()), key


@every
def test_ghost_clips_by_the_norms_of_autograd(name):
    """Without falling back on gradients: every layer is called once."""
    net, (x, y) = network(name), text()
    truth = alone(net, x, y)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in truth]).norm(dim=0)
    bound = float(norms.median())
    factors = (bound / (norms + 1e-6)).clamp(max=1.0)
    assert 0 < int((factors < 1).sum()) < len(x)
    with attached([net], "ghost", bound) as gradients:
        for _ in range(2):
            gradients.clear()
            assert gradients.backward(losses(net, x, y)).all()
            for (key, p), each in zip(net.named_parameters(), truth, strict=True):
                own = each.flatten(1).norm(dim=1)
                assert torch.allclose(p._norm_sample, own, atol=1e-5, rtol=1e-4), key
                expected = torch.einsum("n,n...->...", factors, each)
                assert torch.allclose(p.grad, expected, atol=1e-5, rtol=1e-4), key
        assert gradients.form()


@every
@pytest.mark.parametrize("mode", ["hooks", "functorch", "ghost"])
def test_an_example_that_is_not_finite_is_found_and_spoils_no_other(name, mode):
    net, (x, y) = network(name), text()
    scale = torch.ones(len(x))
    scale[3] = torch.inf
    with attached([net], mode, 1.0) as gradients:
        gradients.clear()
        finite = gradients.backward(losses(net, x, y) * scale)
    assert finite.tolist() == [True, True, True, False, True, True]


@every
def test_nothing_is_left_behind(name):
    net, (x, y) = network(name), text()
    with attached([net], "ghost", 1.0) as gradients:
        gradients.clear()
        gradients.backward(losses(net, x, y))
    before = [torch.autograd.grad(losses(net, x, y).sum(), list(net.parameters()))]
    for found, expected in zip(before[0], alone(net, x, y), strict=True):
        assert torch.allclose(found, expected.sum(0), atol=1e-5, rtol=1e-4)
    assert not any(hasattr(p, "grad_sample") for p in net.parameters())
