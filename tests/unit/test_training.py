"""Training options: the learning rate over rounds, the optimizers, what is refused."""

import pytest
import torch
from torch import nn

from fedkd.clients.training import Training
from fedkd.errors import ConfigError
from fedkd.options import build


def test_cosine_goes_from_lr_to_its_share():
    training = Training(lr=0.2, schedule="cosine", final_lr=0.25)
    rates = [training.lr_at(r, 11) for r in range(1, 12)]
    assert rates[0] == 0.2
    assert rates[-1] == pytest.approx(0.05)
    assert rates[5] == pytest.approx(0.125), "halfway: the mean of both ends"
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_one_round_is_constant(schedule):
    assert Training(lr=0.2, schedule=schedule).lr_at(1, 1) == 0.2
    assert Training(lr=0.2).lr_at(7, 9) == 0.2


def test_the_optimizer_has_the_options():
    parameters = [nn.Parameter(torch.zeros(2))]
    sgd = Training(momentum=0.9, weight_decay=0.1).make(parameters, 0.3)
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.9, 0.1)
    adam = Training(optimizer="adam", weight_decay=0.1).make(parameters, 0.3)
    assert isinstance(adam, torch.optim.Adam)
    assert (adam.param_groups[0]["lr"], adam.param_groups[0]["weight_decay"]) == (0.3, 0.1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", 0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("momentum", 1),
        ("momentum", float("nan")),
        ("weight_decay", -1),
        ("epochs", 0),
        ("steps", -1),
        ("batch_size", 0),
        ("optimizer", "lion"),
        ("final_lr", 1.5),
        ("max_grad_norm", -0.1),
    ],
)
def test_impossible_values_are_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=f"training.{key}"):
        build(Training, {key: value}, "training")
