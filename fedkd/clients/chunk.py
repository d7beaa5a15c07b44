"""How many inputs go through a network at once where nothing is learned."""

from __future__ import annotations

from torch import Tensor

CHUNK = 4096
"""Inputs in one forward pass: bounds memory, large enough not to cost time."""


def rows_at_once(x: Tensor) -> int:
    """Return how many of the inputs ``x`` are taken at once: :data:`CHUNK`, or as many tokens.

    >>> import torch
    >>> rows_at_once(torch.zeros(9, 1, 28, 28)), rows_at_once(torch.zeros(9, 64, dtype=torch.long))
    (4096, 64)
    """
    return CHUNK if x.dtype.is_floating_point else max(1, CHUNK // x.shape[1])
