"""Noise of DP-SGD: what is added to a sum of clipped gradients, and where the result is divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fedkd.rng import Rng

BLOCK = 1 << 16
"""Numbers that are drawn at once, so that they stay in the cache meanwhile."""


class Noise:
    """Normal numbers of one standard deviation, on and on from one addressed stream.

    From the whole 128-bit address: a torch seed on the CPU has 32 bits only. ``mode`` is that of
    DP-SGD: ``auto`` and ``bookkeeping`` draw by :class:`BoxMuller`, the others by NumPy's ziggurat,
    which has tails up to 8.2 standard deviations in float32 and takes six times as long.
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
            self._drawn = torch.empty(sum(sizes), dtype=torch.float32)
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


class Keystream:
    """Bits on and on, by AES-128 in counter mode; the key is an address.

    Who does not know the address cannot tell them from coins, and they cost a sixth of Philox'.
    Source: NIST SP 800-38A, section 6.5.
    """

    def __init__(self, rng: Rng) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        key = algorithms.AES(rng.key.to_bytes(16, "big"))
        self._cipher = Cipher(key, modes.CTR(bytes(16))).encryptor()
        self._plain = memoryview(b"")

    def write(self, out: memoryview) -> None:
        """Write the next bytes to ``out``."""
        if len(self._plain) < len(out):
            self._plain = memoryview(bytes(len(out)))
        self._cipher.update_into(self._plain[: len(out)], out)


class BoxMuller:
    """Standard normal numbers ``sqrt(-2 ln u) (cos a, sin a)`` in pairs, all at once.

    u has 63 bits and a 32, all from :class:`Keystream` at the address: the tails reach to
    sqrt(128 ln 2) = 9.4 standard deviations, and beyond them are 5e-21 of a normal distribution.
    Last bits depend on torch's vector arithmetic. Source: Box and Muller, Ann. Math. Stat. 29
    (1958).
    """

    def __init__(self, rng: Rng) -> None:
        self._bits, self._out = Keystream(rng), torch.empty(0)
        self._pairs, self._held = list[Pairs](), torch.empty(2, 0)

    def fill(self, out: Tensor) -> None:
        """Write the next numbers to ``out`` (n,); of an odd number the last one's twin is lost."""
        if out is not self._out:
            wide = (min(len(out), BLOCK) + 1) // 2
            self._held = torch.empty(2, wide, dtype=torch.float32)
            self._pairs = [Pairs(block, self._held) for block in out.split(BLOCK)]
            self._out = out
        for pairs in self._pairs:
            pairs.draw(self._bits)


class Pairs:
    """Where the pairs of a block of normal numbers arise, from bits that lie in the same place.

    ``held`` (2, n / 2 or more) is room for their radii and angles.
    """

    least = 2.0**-64
    """Half of a 64-bit number's last place, so that no logarithm is that of nought."""

    def __init__(self, out: Tensor, held: Tensor) -> None:
        half = (len(out) + 1) // 2
        self.asked, self.out = out, out if len(out) == 2 * half else out.new_empty(2 * half)
        self.radius, self.angle = held[0, :half], held[1, :half]
        self.cosine, self.sine = self.out[:half], self.out[half:]
        self.high, self.low = self.cosine.view(torch.int32), self.sine.view(torch.int32)
        self.memory = memoryview(self.out.numpy().data).cast("B")
        self.offset = torch.tensor(self.least, dtype=torch.float32)

    def draw(self, bits: Keystream) -> None:
        """Draw the block."""
        radius, angle = self.radius, self.angle
        bits.write(self.memory)
        # The size of a signed number of 64 bits, scaled before the logarithm: near 1 it needs that.
        radius.copy_(self.high).add_(angle.copy_(self.low), alpha=2.0**-32).abs_()
        torch.add(self.offset, radius, alpha=2.0**-31, out=radius)
        radius.log_().mul_(-2.0).sqrt_()
        bits.write(self.memory[: len(self.memory) // 2])
        angle.copy_(self.high).mul_(math.pi * 2.0**-31)
        torch.sin(angle, out=self.sine).mul_(radius)
        torch.cos(angle, out=self.cosine).mul_(radius)
        if self.out is not self.asked:
            self.asked.copy_(self.out[: len(self.asked)])


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
        if self._sums is not found:
            for p, total in zip(self.parameters, self._sums, strict=True):
                p.grad = total
        self._sums = []
