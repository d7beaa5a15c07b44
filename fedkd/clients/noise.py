"""Noise of DP-SGD: what is added to a sum of clipped gradients, and where the result is divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.rng import Rng

BLOCK = 1 << 15
"""Numbers that are drawn at once, so that they stay in the cache meanwhile."""


class Noise:
    """Normal numbers of one standard deviation, on and on from one addressed stream.

    From the whole 128-bit address: a torch seed on the CPU has 32 bits only. ``mode`` is that of
    DP-SGD: ``auto`` and ``bookkeeping`` draw by :class:`BoxMuller`, the others by NumPy's ziggurat,
    which has tails up to 8.2 standard deviations in float32 and takes four times as long.
    """

    def __init__(self, rng: Rng, std: float, mode: str) -> None:
        self.std = std
        self._source = BoxMuller(rng) if mode in ("auto", "bookkeeping") else Ziggurat(rng)
        self._drawn, self._views = torch.empty(0), list[Tensor]()

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add noise to tensors, one after another, each in row-major order."""
        if not self.std:
            return
        if [t.shape for t in tensors] != [v.shape for v in self._views]:
            sizes = [t.numel() for t in tensors]
            self._drawn = torch.empty(sum(sizes))
            pairs = zip(self._drawn.split(sizes), tensors, strict=True)
            self._views = [part.view(t.shape) for part, t in pairs]
        self._source.fill(self._drawn)
        noise = [v.to(t) for v, t in zip(self._views, tensors, strict=True)]
        torch._foreach_add_(list(tensors), noise, alpha=self.std)


class Ziggurat:
    """NumPy's standard normal numbers in float32."""

    def __init__(self, rng: Rng) -> None:
        self._generator = rng.numpy()

    def fill(self, out: Tensor) -> None:
        """Write the next numbers to ``out`` (n,)."""
        self._generator.standard_normal(out=out.numpy(), dtype=np.float32)


class BoxMuller:
    """Standard normal numbers ``sqrt(-2 ln u) (cos a, sin a)`` in pairs, all at once.

    u has 63 bits and a 32, all from Philox at the address: the tails reach to sqrt(128 ln 2) = 9.4
    standard deviations, and beyond them are 5e-21 of a normal distribution. Last bits depend on
    torch's vector arithmetic. Source: Box and Muller, Ann. Math. Stat. 29 (1958).
    """

    def __init__(self, rng: Rng) -> None:
        self._bits = np.random.Philox(key=rng.key)
        self._held = torch.empty((3, BLOCK // 2))

    def fill(self, out: Tensor) -> None:
        """Write the next numbers to ``out`` (n,); of an odd number the last one's twin is lost."""
        for block in out.split(BLOCK):
            self._block(block)

    def _block(self, out: Tensor) -> None:
        half = (len(out) + 1) // 2
        radius, angle, wave = self._held[:, :half]
        words = self._bits.random_raw(half + (half + 1) // 2)
        # Without the top bit, for torch is quick with signed numbers alone.
        words[:half] >>= np.uint64(1)
        signed = torch.from_numpy(words.view(np.int64))
        # Scaled before the logarithm, as numbers near 1 need; 0 is half of the next.
        radius.copy_(signed[:half]).add_(0.5).mul_(2.0**-63).log_().mul_(-2.0).sqrt_()
        angle.copy_(signed[half:].view(torch.int32)[:half])
        angle.mul_(math.pi * 2.0**-31)
        torch.mul(radius, torch.cos(angle, out=wave), out=out[:half])
        sines = torch.sin(angle, out=wave)[: len(out) - half]
        torch.mul(radius[: len(sines)], sines, out=out[half:])


class Taker(Protocol):
    """Makes of the gradients of a batch what may be released of them."""

    def take(self, last: bool) -> None:
        """Take the gradients of a part of the batch; at the ``last`` leave the result in them."""


class Noised:
    """Adds up clipped gradients over the parts of a batch, adds noise, and divides.

    As Opacus' ``DPOptimizer`` does, for gradients that are clipped and summed already.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], noise: Noise, divisor: float = 1.0
    ) -> None:
        self.parameters, self.noise, self.divisor = parameters, noise, divisor
        self._sums: list[Tensor] = []

    @torch.no_grad()
    def take(self, last: bool) -> None:
        """Take the gradients of a part of the batch; at the ``last`` leave the result in them."""
        found = [p.grad for p in self.parameters if p.grad is not None]
        if self._sums:
            torch._foreach_add_(self._sums, found)
        else:
            self._sums = found
        if not last:
            return
        self.noise.add(self._sums)
        if self.divisor != 1.0:
            torch._foreach_div_(self._sums, self.divisor)
        for p, total in zip(self.parameters, self._sums, strict=True):
            p.grad = total
        self._sums = []
