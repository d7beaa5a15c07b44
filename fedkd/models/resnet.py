"""A residual network small enough for one client, with GroupNorm.

BatchNorm mixes the examples of a batch, which DP-SGD forbids, and its running statistics diverge
between clients with different labels; GroupNorm does neither.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedkd.models.base import BlockNet, images
from fedkd.models.registries import models
from fedkd.options import options
from fedkd.types import Task


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut: ``relu(x' + norm(conv(relu(norm(conv(x))))))``.

    The shortcut ``x'`` is ``x``, or its 1x1 projection where the shape changes. A stride picks the
    pixels before the projection: oneDNN's gradient of a strided 1x1 convolution of fewer than 16
    channels writes past its memory on channels-last maps.
    """

    def __init__(self, before: int, after: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, after)
        self.stride = stride
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            projection = nn.Conv2d(before, after, 1, bias=False)
            self.shortcut = nn.Sequential(projection, nn.GroupNorm(groups, after))

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the new number of channels, ``1/stride`` as high and wide."""
        hidden = functional.relu(self.norm1(self.conv1(x)))
        picked = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        return functional.relu(self.shortcut(picked) + self.norm2(self.conv2(hidden)))


@models.register("resnet8")
@options
class ResNet8:
    """ResNet with 8 layers and GroupNorm; blocks stem, stage1, stage2, stage3, head.

    The CIFAR design of He et al. (CVPR 2016) with one residual block a stage, GroupNorm (Wu and
    He, ECCV 2018) for BatchNorm. About 78,000 parameters at the default width.
    """

    width: Annotated[int, Field(ge=1, description="channels of stem and stage1; then 2x, 4x")] = 16
    groups: Annotated[int, Field(ge=1, description="groups of GroupNorm; must divide width")] = 8

    @pydantic.model_validator(mode="after")
    def _check(self) -> ResNet8:
        if self.width % self.groups:
            raise ValueError(
                f"groups = {self.groups} does not divide width = {self.width}; "
                "choose a divisor, for instance 1"
            )
        return self

    def build(self, task: Task) -> BlockNet:
        """Return the structure for ``task``.

        Raises:
            ConfigError: the inputs are no images, or smaller than 4x4.
        """
        channels, _, _ = images(task, "resnet8", least=4)
        width, groups = self.width, self.groups
        stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        blocks = {
            "stem": nn.Sequential(stem, nn.GroupNorm(groups, width), nn.ReLU()),
            "stage1": Residual(width, width, 1, groups),
            "stage2": Residual(width, 2 * width, 2, groups),
            "stage3": Residual(2 * width, 4 * width, 2, groups),
        }
        classifier = nn.Linear(4 * width, task.classes)
        return BlockNet(blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), classifier))
