"""A vision transformer small enough for one client: the heterogeneous partner of the CNNs.

Attention is written out over ``nn.Linear``, because per-example gradients do not exist for
``nn.MultiheadAttention``; no dropout, so a forward pass has no randomness.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn

from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet, images
from fedkd.models.registries import models
from fedkd.options import options
from fedkd.types import Task


class Positions(nn.Module):
    """Adds a learned vector to each token: ``(batch, tokens, width) -> the same``."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with the position of each token added."""
        return x + self.position


class Patches(nn.Module):
    """Embeds square patches: ``(batch, channels, h, w) -> (batch, tokens, width)``."""

    def __init__(self, channels: int, width: int, patch: int, tokens: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = Positions(tokens, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return one token a patch, row by row."""
        tokens: Tensor = self.positions(self.embed(x).flatten(2).transpose(1, 2))
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention ``softmax(q k^T / sqrt(d)) v`` (Vaswani et al., NeurIPS 2017)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.mix_in = nn.Linear(width, 3 * width)
        self.mix_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)`` for the same shape."""
        batch, tokens, width = x.shape
        mixed = self.mix_in(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-2, -1) * (width // self.heads) ** -0.5
        read = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, tokens, width)
        answer: Tensor = self.mix_out(read)
        return answer


class Transformer(nn.Module):
    """One pre-norm transformer block: attention, then two linear layers, each beside a shortcut."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)`` for the same shape."""
        x = x + self.attention(self.norm1(x))
        after: Tensor = x + self.feed(self.norm2(x))
        return after


class TokenMean(nn.Module):
    """Averages over tokens: ``(batch, tokens, width) -> (batch, width)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean token."""
        return x.mean(1)


@models.register("vit-tiny")
@options
class VitTiny:
    """Tiny vision transformer without dropout; blocks patches, block1, block2, ..., head.

    After Dosovitskiy et al. (ICLR 2021), with the mean of tokens in place of a class token. About
    140,000 parameters on 1x28x28 (49 tokens).
    """

    patch: Annotated[int, Field(ge=1, description="side of a patch; must divide the image")] = 4
    width: Annotated[int, Field(ge=1, description="numbers in a token; a multiple of heads")] = 64
    depth: Annotated[int, Field(ge=1, description="transformer blocks")] = 4
    heads: Annotated[int, Field(ge=1, description="attention heads")] = 4
    hidden: Annotated[int, Field(ge=1, description="units between two linear layers")] = 128

    @pydantic.model_validator(mode="after")
    def _check(self) -> VitTiny:
        if self.width % self.heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of heads = {self.heads}; "
                f"use {self.width // self.heads * self.heads or self.heads}"
            )
        return self

    def build(self, task: Task) -> BlockNet:
        """Return the structure for ``task``.

        Raises:
            ConfigError: the inputs are no images, or the patch does not divide their sides.
        """
        channels, height, width = images(task, "vit-tiny", least=1)
        if height % self.patch or width % self.patch:
            fit = [p for p in range(1, min(height, width) + 1) if not (height % p or width % p)]
            raise ConfigError(
                f"model 'vit-tiny': patch = {self.patch} does not divide the images of task "
                f"{task.name!r} ({height}x{width}); allowed: {', '.join(map(str, fit))}"
            )
        tokens = (height // self.patch) * (width // self.patch)
        blocks: dict[str, nn.Module] = {
            "patches": Patches(channels, self.width, self.patch, tokens)
        }
        for i in range(1, self.depth + 1):
            blocks[f"block{i}"] = Transformer(self.width, self.heads, self.hidden)
        classifier = nn.Linear(self.width, task.classes)
        return BlockNet(blocks, nn.Sequential(nn.LayerNorm(self.width), TokenMean(), classifier))
