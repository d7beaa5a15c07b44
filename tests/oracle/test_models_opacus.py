"""Opacus accepts every model, and its per-example gradients equal those of batches of one."""

import pytest
import torch
from torch import nn

from fedkd.models.base import BlockNet, build, row_major
from fedkd.models.registries import models
from fedkd.rng import Rng
from fedkd.types import Task

TEXT = ("gpt-tiny", "lstm")
"""Models that read rows of text: see test_sequence_models.py."""
GREY = Task(name="grey", input_shape=(1, 12, 12), classes=3)
COLOUR = Task(name="colour", input_shape=(3, 12, 12), classes=3)

# Every first layer draws this from the way in which Opacus hooks it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning")


@pytest.mark.parametrize("name", [n for n in models.names() if n not in TEXT])
def test_opacus_accepts(name):
    from opacus.validators import ModuleValidator

    net = build(name, {}, GREY, Rng(0))
    assert ModuleValidator.validate(net, strict=True) == []


def loss(net: BlockNet, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """A sum over examples that reads logits and the features behind every block."""
    logits, features = net.forward_with_features(x, net.names)
    own = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return own + sum(f.square().mean(1).sum() for f in features.values())


@pytest.mark.parametrize("name", [n for n in models.names() if n not in TEXT])
@pytest.mark.parametrize("task", [GREY, COLOUR], ids=lambda task: task.name)
@pytest.mark.parametrize("sampler", ["hooks", "functorch"])
def test_per_example_gradients_equal_batches_of_one(name, task, sampler):
    from opacus.grad_sample import GradSampleModule

    net = build(name, {}, task, Rng(0))
    x = torch.randn(3, *task.input_shape, generator=Rng(1).torch())
    x = x.to(memory_format=torch.channels_last)
    if sampler == "hooks":
        row_major(net)
        x = x.to(memory_format=torch.contiguous_format)
    labels, parameters = torch.arange(3), list(net.parameters())
    alone = [
        torch.autograd.grad(loss(net, x[i : i + 1], labels[i : i + 1]), parameters)
        for i in range(3)
    ]

    GradSampleModule(net, loss_reduction="sum", force_functorch=sampler == "functorch")
    loss(net, x, labels).backward()
    for j, (key, p) in enumerate(net.named_parameters()):
        truth = torch.stack([gradients[j] for gradients in alone])
        assert torch.allclose(p.grad_sample, truth, atol=1e-5, rtol=1e-4), key
