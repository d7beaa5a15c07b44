"""The multi-layer perceptron: the cheapest model, and the only one for inputs without a grid."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Annotated

from pydantic import Field
from torch import nn

from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.models.registries import models
from fedkd.options import Count, options
from fedkd.types import Task


@models.register("mlp")
@options
class Mlp:
    """Multi-layer perceptron on flattened inputs; blocks fc1, fc2, ..., head.

    The default is the "2NN" of McMahan et al. (AISTATS 2017), 199,210 parameters on 1x28x28.
    """

    hidden: Annotated[
        tuple[Count, ...], Field(min_length=1, description="units of each hidden layer")
    ] = (200, 200)

    def build(self, task: Task) -> BlockNet:
        """Return the structure for ``task``; any shape of numbers fits.

        Raises:
            ConfigError: the inputs are text.
        """
        if task.sequence:
            raise ConfigError(
                f"model 'mlp' reads numbers, and an input of task {task.name!r} is a row of text; "
                "use model 'gpt-tiny' or 'lstm'"
            )
        sizes = (math.prod(task.input_shape), *self.hidden)
        blocks: dict[str, nn.Module] = {}
        for i, (before, after) in enumerate(pairwise(sizes), start=1):
            layers = [nn.Linear(before, after), nn.ReLU()]
            blocks[f"fc{i}"] = nn.Sequential(*([nn.Flatten()] if i == 1 else []), *layers)
        return BlockNet(blocks, nn.Linear(sizes[-1], task.classes))
