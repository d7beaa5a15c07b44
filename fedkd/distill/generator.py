"""Generators: networks that make inputs, or features, for a label, where no data may be had.

Only structure and sampling stand here; what a generator is trained for is put together from the
terms in ``clients/synthesis.py``. All use normalisation over one example: BatchNorm's running
statistics would be state that no aggregation or privacy mechanism covers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.models.base import BlockNet
from fedkd.models.book import load
from fedkd.models.initial import initialise
from fedkd.rng import Rng
from fedkd.types import Arrays, Task


class Codes(nn.Module):
    """What a generator is given, by index: noise beside the one-hot label, ``(B,) -> (B, d + C)``.

    ``noise`` (n, d) and ``labels`` (n,). With ``learned`` the noise is optimised with the
    generator, as DENSE does.
    """

    def __init__(self, noise: Tensor, labels: Tensor, classes: int, *, learned: bool = False):
        super().__init__()
        self.noise = nn.Parameter(noise.clone(), requires_grad=learned)
        self.labels = labels
        self.classes = classes

    def forward(self, index: Tensor) -> Tensor:
        hot = functional.one_hot(self.labels[index], self.classes)
        return torch.cat([self.noise[index], hot.to(self.noise.dtype)], dim=1)


class Bounded(nn.Module):
    """Keeps values within a range: ``low + (high - low) sigmoid(u)``."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, u: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * torch.sigmoid(u)


class Grown(nn.Module):
    """Enlarges maps to a given size (nearest neighbour), then convolves: one stage of a decoder."""

    def __init__(self, before: int, after: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size
        self.conv = nn.Conv2d(before, after, 3, padding=1)
        self.norm = nn.GroupNorm(1, after)

    def forward(self, maps: Tensor) -> Tensor:
        grown = functional.interpolate(maps, size=self.size, mode="nearest")
        return functional.leaky_relu(self.norm(self.conv(grown)), 0.2)


def feature_generator(noise: int, classes: int, size: int, hidden: int) -> BlockNet:
    """Return ``(noise, one-hot label) -> feature (size,)``: linear, norm, ReLU, linear.

    Source: Zhu et al., FedGen, ICML 2021, section 5; LayerNorm in place of its BatchNorm.
    """
    first = nn.Sequential(nn.Linear(noise + classes, hidden), nn.LayerNorm(hidden), nn.ReLU())
    return BlockNet({"hidden": first}, nn.Linear(hidden, size))


def input_generator(noise: int, task: Task, width: int) -> BlockNet:
    """Return ``(noise, one-hot label) -> input`` with values within the task's bounds.

    Images grow from a quarter of their size in two stages of ``2 width`` and ``width`` channels,
    as in the generators of DAFL and DENSE, smaller; other inputs are made by a perceptron with
    ``16 width`` hidden units.
    """
    size = noise + task.classes
    bounded = Bounded(*task.bounds)
    if len(task.input_shape) != 3:
        n, hidden = math.prod(task.input_shape), 16 * width
        first = nn.Sequential(nn.Linear(size, hidden), nn.LayerNorm(hidden), nn.ReLU())
        shaped = nn.Unflatten(1, task.input_shape)
        return BlockNet({"hidden": first}, nn.Sequential(nn.Linear(hidden, n), shaped, bounded))
    channels, height, width_px = task.input_shape
    quarter = (max(1, height // 4), max(1, width_px // 4))
    half = (max(1, height // 2), max(1, width_px // 2))
    maps = 2 * width
    flat = maps * quarter[0] * quarter[1]
    seed = nn.Sequential(nn.Linear(size, flat), nn.Unflatten(1, (maps, *quarter)))
    blocks: dict[str, nn.Module] = {
        "seed": nn.Sequential(seed, nn.GroupNorm(1, maps)),
        "coarse": Grown(maps, maps, half),
        "fine": Grown(maps, width, (height, width_px)),
    }
    return BlockNet(blocks, nn.Sequential(nn.Conv2d(width, channels, 3, padding=1), bounded))


def filled(generator: BlockNet, rng: Rng, weights: Arrays | None = None) -> BlockNet:
    """Return ``generator`` with ``weights``; parameters that they do not hold come from ``rng``."""
    initialise(generator, rng)
    load(generator, weights or {})
    return generator


def draw_labels(n: int, weights: Tensor, rng: Rng) -> Tensor:
    """Return n labels (n,) in proportion to ``weights`` (C,); a class of weight 0 is never drawn.

    Where all weights are 0 every class is as likely: nothing is known of any.
    """
    weights = weights if bool((weights > 0).any()) else torch.ones_like(weights)
    return torch.multinomial(weights.cpu(), n, replacement=True, generator=rng.torch())


def draw_noise(n: int, size: int, rng: Rng) -> Tensor:
    """Return standard normal noise (n, size)."""
    return torch.randn(n, size, generator=rng.torch())


def driven(codes: Codes, generator: BlockNet) -> BlockNet:
    """Return the network index -> sample, which the one training loop trains like any other."""
    return BlockNet({"codes": codes}, generator)
