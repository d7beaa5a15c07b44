"""A transformer that predicts the next token, small enough for one client: another than the LSTM.

Attention is that of the vision transformer, over what came before alone; no dropout, no buffer:
which places come before is a matter of the operation, so no mask is stored.
"""

from __future__ import annotations

from typing import Annotated

import pydantic
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedkd.errors import ConfigError
from fedkd.models.base import BlockNet
from fedkd.models.registries import models
from fedkd.models.tokens import Embedding, sequences
from fedkd.models.vit import Attention, Transformer
from fedkd.options import Count, options
from fedkd.types import Task


class Places(nn.Module):
    """Adds a learned vector to each place: ``(batch, places, width) -> the same``."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(places, width))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` with the vector of each place added.

        Raises:
            ConfigError: there are more places than vectors.
        """
        if x.shape[1] > len(self.position):
            raise ConfigError(
                f"model 'gpt-tiny' has learned {len(self.position)} places, but was given a "
                f"sequence of {x.shape[1]} tokens; cut it, or make the sequences of the data longer"
            )
        return x + self.position[: x.shape[1]]


class CausalAttention(Attention):
    """Multi-head self-attention to a token itself and to those before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(batch, tokens, width)`` for the same shape."""
        batch, tokens, width = x.shape
        mixed = self.mix_in(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        answer: Tensor = self.mix_out(read.transpose(1, 2).reshape(batch, tokens, width))
        return answer


class CausalTransformer(Transformer):
    """One pre-norm transformer block whose attention looks back alone."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__(width, heads, hidden)
        self.attention = CausalAttention(width, heads)


@models.register("gpt-tiny")
@options
class GptTiny:
    """Tiny causal transformer for text, no dropout; blocks embed, block1, block2, ..., head.

    After Radford et al., Language Models are Unsupervised Multitask Learners (2019), with a head of
    its own. About 120,000 parameters with 100 tokens and 80 places.
    """

    width: Annotated[Count, Field(description="numbers in a token; a multiple of heads")] = 64
    depth: Annotated[Count, Field(description="transformer blocks")] = 2
    heads: Annotated[Count, Field(description="attention heads")] = 4
    hidden: Annotated[Count, Field(description="units between two linear layers")] = 256

    @pydantic.model_validator(mode="after")
    def _check(self) -> GptTiny:
        if self.width % self.heads:
            raise ValueError(
                f"width = {self.width} is not a multiple of heads = {self.heads}; "
                f"use {self.width // self.heads * self.heads or self.heads}"
            )
        return self

    def build(self, task: Task) -> BlockNet:
        """Return the structure for ``task``; shorter sequences than the task's go through, too.

        Raises:
            ConfigError: the inputs are no sequences of tokens.
        """
        length, vocabulary = sequences(task, "gpt-tiny")
        embed = nn.Sequential(Embedding(vocabulary, self.width), Places(length, self.width))
        blocks: dict[str, nn.Module] = {"embed": embed}
        for i in range(1, self.depth + 1):
            blocks[f"block{i}"] = CausalTransformer(self.width, self.heads, self.hidden)
        head = nn.Sequential(nn.LayerNorm(self.width), nn.Linear(self.width, vocabulary))
        return BlockNet(blocks, head)
