"""Addressed randomness: every draw is named by (seed, purpose, round, client), never by order.

There is no global generator and no stored generator state, so the order of clients, the number of
workers and a kill with resume cannot change a result.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass

import numpy as np
import torch

Part = str | int


@dataclass(frozen=True)
class Rng:
    """An address in the tree of random streams; generators are made from it on demand.

    Two generators of the same address give the same numbers; addresses that differ in any part
    give independent ones (the key is a BLAKE2b hash of the path).

    >>> a = Rng(0).child("local", 3, 7)
    >>> a.uniform() == Rng(0).child("local", 3, 7).uniform()
    True
    >>> a.key == Rng(0).child("local", 37).key
    False
    """

    seed: int
    path: tuple[Part, ...] = ()

    def child(self, *path: Part) -> Rng:
        """Return the stream below this one, for instance ``rng.child("batches", epoch)``."""
        return Rng(self.seed, self.path + path)

    @property
    def key(self) -> int:
        """The 128-bit key of this address."""
        parts = [f"{type(p).__name__[0]}{len(str(p))}:{p}" for p in (self.seed, *self.path)]
        digest = hashlib.blake2b("/".join(parts).encode(), digest_size=16).digest()
        return int.from_bytes(digest, "big")

    def numpy(self) -> np.random.Generator:
        """Return a fresh NumPy generator at the start of this stream."""
        return np.random.Generator(np.random.Philox(key=self.key))

    def torch(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a fresh torch generator at the start of this stream."""
        return torch.Generator(device=device).manual_seed(self.key & (2**63 - 1))

    def uniform(self) -> float:
        """Return the one uniform number in [0, 1) of this address: the first of :meth:`numpy`."""
        return float(_here.generator.at(self).random())


class Restarted:
    """One generator that goes to any address: a new one each time costs as much as a layer."""

    def __init__(self) -> None:
        self._bits = np.random.Philox(key=0)
        self._numbers, self._start = np.random.Generator(self._bits), self._bits.state

    def at(self, rng: Rng) -> np.random.Generator:
        """Return the generator that ``rng.numpy()`` would be; it is the same object every time."""
        key = rng.key
        self._start["state"]["key"][:] = key & (2**64 - 1), key >> 64
        self._bits.state = self._start
        return self._numbers


class _Here(threading.local):
    """What each thread draws single numbers with."""

    def __init__(self) -> None:
        self.generator = Restarted()


_here = _Here()


def stream(seed: int, *path: Part) -> Rng:
    """Return the random stream addressed by ``seed`` and ``path``.

    >>> stream(1, "cohort", 4, 2).uniform() == stream(1, "cohort", 4, 2).uniform()
    True
    """
    return Rng(seed, path)
