"""The networks of the work, written out by hand for backends that must not use ours.

Parameters have the names of ``work.initial``. As in fedkd's CNN, pooling stands before ReLU: the
functions are equal, and a difference in speed is then that of the loop, not of the model.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedkd.bench.work import Work

if TYPE_CHECKING:
    from torch import nn


def network(work: Work, dtype: str = "float32") -> nn.Module:
    """Return the network of a work with its initial weights."""
    return by_hand(work.kind, work.x.shape[1:], work.initial, dtype)


def by_hand(
    kind: str, shape: tuple[int, ...], initial: Mapping[str, np.ndarray], dtype: str = "float32"
) -> nn.Module:
    """Return a network of torch's own layers, row-major, for inputs of a shape."""
    import torch
    from torch import nn

    sizes = {name: w.shape for name, w in initial.items()}
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if kind == "cnn":
        (first, before), (second, _) = (sizes[f"conv{i}.0.weight"][:2] for i in (1, 2))
        parts["conv1"] = nn.Sequential(
            nn.Conv2d(before, first, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()
        )
        parts["conv2"] = nn.Sequential(
            nn.Conv2d(first, second, 5, padding=2), nn.MaxPool2d(2), nn.ReLU()
        )
        inputs = second * (shape[1] // 4) * (shape[2] // 4)
    else:
        inputs = math.prod(shape)
    hidden, classes = sizes["fc1.1.weight"][0], sizes["head.weight"][0]
    parts["fc1"] = nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), nn.ReLU())
    parts["head"] = nn.Linear(hidden, classes)
    net = nn.Sequential(parts).to(getattr(torch, dtype))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.tensor(initial[name]))
    return net
