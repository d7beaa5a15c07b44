"""From bytes to network inputs: pixels in 0..255 become float32 with one fixed mean and deviation.

The constants belong to the data set, never to a client: statistics of a client would be a release
of its data and would shift its inputs against everybody else's.
"""

from __future__ import annotations

import numpy as np

Channels = tuple[float, ...]


def normalise(pixels: np.ndarray, mean: Channels, std: Channels, top: float = 255.0) -> np.ndarray:
    """Return ``(pixels / top - mean) / std`` as float32 ``(n, channels, height, width)``.

    Args:
        pixels: ``(n, height, width)`` for one channel, else ``(n, height, width, channels)``.
        mean: mean of each channel of ``pixels / top``.
        std: standard deviation of each channel.
        top: the value of a white pixel.
    """
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    out = np.empty((len(pixels), len(mean), *pixels.shape[1:3]), dtype=np.float32)
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        np.multiply(pixels[..., c], np.float32(1 / (top * s)), out=out[:, c], dtype=np.float32)
        out[:, c] -= np.float32(m / s)
    return out
