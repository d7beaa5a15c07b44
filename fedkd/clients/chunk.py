"""How many inputs go through a network at once where nothing is learned."""

from __future__ import annotations

from torch import Tensor

CHUNK = 4096
"""Inputs in one forward pass: bounds memory, large enough not to cost time."""
NEAR = 256
"""As many on a CPU: more, and the maps of a convolution are asked of the system anew each time."""


def rows_at_once(x: Tensor) -> int:
    """Return how many of the inputs ``x`` are taken at once: of text, :data:`CHUNK` tokens.

    >>> import torch
    >>> rows_at_once(torch.zeros(9, 1, 28, 28)), rows_at_once(torch.zeros(9, 64, dtype=torch.long))
    (256, 64)
    """
    if not x.dtype.is_floating_point:
        return max(1, CHUNK // x.shape[1])
    return min(CHUNK, NEAR) if x.is_cpu else CHUNK
