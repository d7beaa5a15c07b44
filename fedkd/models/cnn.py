"""Two plain convolutional networks: the small CNN of federated learning papers, and LeNet-5.

Max-pooling stands before ReLU: the two commute, and ReLU then has a quarter of the work.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.models.base import BlockNet, images
from fedkd.models.registries import models
from fedkd.options import Count, options
from fedkd.types import Task


class Halving(nn.MaxPool2d):
    """Max-pooling over squares of 2x2 pixels: ``(..., h, w) -> (..., h // 2, w // 2)``.

    Where nothing is learned, nobody asks which pixel it was: then the largest is found by comparing
    rows and columns, the same numbers in a third of the time on a CPU.
    """

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the largest of each square; an odd last row or column is left out."""
        if torch.is_grad_enabled() or not x.is_cpu or min(x.shape[-2:]) < 2:
            pooled: Tensor = super().forward(x)
            return pooled
        height, width = (side // 2 * 2 for side in x.shape[-2:])
        rows = torch.maximum(x[..., 0:height:2, :], x[..., 1:height:2, :])
        return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def _convolution(before: int, after: int, padding: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 5, padding=padding), Halving(), nn.ReLU())


@models.register("cnn")
@options
class Cnn:
    """Small CNN with padded 5x5 convolutions; blocks conv1, conv2, fc1, head.

    The default has 215,370 parameters on 1x28x28. Each convolution halves height and width.
    """

    channels: Annotated[
        tuple[Count, ...], Field(min_length=1, description="channels of each convolution")
    ] = (16, 32)
    hidden: Annotated[int, Field(ge=1, description="units of the fully connected layer")] = 128

    def build(self, task: Task) -> BlockNet:
        """Return the structure for ``task``.

        Raises:
            ConfigError: the inputs are no images, or too small to be halved by every convolution.
        """
        halvings = len(self.channels)
        before, height, width = images(task, "cnn", least=2**halvings)
        blocks: dict[str, nn.Module] = {}
        for i, after in enumerate(self.channels, start=1):
            blocks[f"conv{i}"] = _convolution(before, after, padding=2)
            before = after
        flat = before * (height >> halvings) * (width >> halvings)
        blocks["fc1"] = nn.Sequential(nn.Flatten(), nn.Linear(flat, self.hidden), nn.ReLU())
        return BlockNet(blocks, nn.Linear(self.hidden, task.classes))


@models.register("lenet")
@options
class LeNet:
    """LeNet-5 with ReLU and max-pooling; blocks conv1, conv2, fc1, fc2, head.

    After LeCun et al. (Proc. IEEE 1998); 61,706 parameters on 1x28x28. The first convolution is
    padded, the second is not, so images need at least 12x12 pixels.
    """

    def build(self, task: Task) -> BlockNet:
        """Return the structure for ``task``.

        Raises:
            ConfigError: the inputs are no images, or smaller than 12x12.
        """
        channels, height, width = images(task, "lenet", least=12)
        flat = 16 * ((height // 2 - 4) // 2) * ((width // 2 - 4) // 2)
        blocks = {
            "conv1": _convolution(channels, 6, padding=2),
            "conv2": _convolution(6, 16, padding=0),
            "fc1": nn.Sequential(nn.Flatten(), nn.Linear(flat, 120), nn.ReLU()),
            "fc2": nn.Sequential(nn.Linear(120, 84), nn.ReLU()),
        }
        return BlockNet(blocks, nn.Linear(84, task.classes))
