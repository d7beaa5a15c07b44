"""A small network beside another: it turns the features of one of its blocks into logits."""

from __future__ import annotations

import torch
from torch import nn

from fedkd.models.base import BlockNet
from fedkd.models.book import load
from fedkd.models.initial import initialise
from fedkd.rng import Rng
from fedkd.types import Arrays


def make_head(size: int, hidden: int, classes: int, rng: Rng, weights: Arrays) -> BlockNet:
    """Return a head ``R^size -> R^classes`` with ``hidden`` units (0: linear) and ``weights``.

    Parameters that ``weights`` does not hold are drawn from ``rng``.
    """
    with torch.device("meta"):
        first = nn.Sequential(nn.Linear(size, hidden), nn.ReLU()) if hidden else nn.Identity()
        head = BlockNet({"hidden": first}, nn.Linear(hidden or size, classes))
    initialise(head, rng)
    load(head, weights)
    return head
