"""Feature shift: turn a client's images by the client's own angle, always to the same bits."""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def rotate(images: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turn images ``(n, channels, height, width)`` counter-clockwise about their centre.

    Bilinear interpolation; what lies outside an image repeats its border, which is background in
    the usual data sets whatever their normalisation. ``degrees = 0`` returns the images untouched.

    >>> x = torch.arange(4.0).reshape(1, 1, 2, 2)
    >>> rotate(x, 90.0).round().flatten().tolist()
    [1.0, 3.0, 0.0, 2.0]
    """
    if degrees == 0 or len(images) == 0:
        return images
    height, width = images.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The grid maps output to input positions in units of half a side, hence the side ratios.
    matrix = [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]]
    one = functional.affine_grid(
        torch.tensor([matrix], dtype=images.dtype), [1, 1, height, width], align_corners=False
    )
    grid = one.expand(len(images), -1, -1, -1)
    return functional.grid_sample(
        images, grid, mode="bilinear", padding_mode="border", align_corners=False
    )
