"""A small network of a policy's own: made once its sizes are known, and kept from fit to fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedkd.distill.policies.base import TargetPolicy
from fedkd.errors import RunError
from fedkd.models.book import load, to_arrays
from fedkd.models.initial import initialise
from fedkd.rng import Rng
from fedkd.types import Arrays


class Learned:
    """Holds a network that ``make`` builds, with what was remembered of it before it was there."""

    def __init__(self) -> None:
        self._net: nn.Module | None = None
        self._kept: Arrays = {}

    @property
    def net(self) -> nn.Module:
        """The network.

        Raises:
            RunError: nobody has said yet how large it is.
        """
        if self._net is None:
            raise RunError("a target policy was asked before its sizes were known")
        return self._net

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the network says of x, in the precision of x."""
        found: Tensor = self.net(x.to(next(self.net.parameters()).dtype))
        return found.to(x.dtype)

    def make(self, layers: Sequence[int], rng: Rng) -> nn.Module:
        """Build a perceptron of these widths with leaky rectifiers, from ``rng``."""
        parts: list[nn.Module] = []
        with torch.device("meta"):
            for i, (n, m) in enumerate(pairwise(layers)):
                parts += [nn.LeakyReLU()] if i else []
                parts.append(nn.Linear(n, m))
            net = nn.Sequential(*parts)
        initialise(net, rng)
        self._net = net
        return net

    def settle(self) -> None:
        """Give the network what was remembered, where there was something."""
        if self._kept:
            load(self.net, self._kept)

    def modules(self) -> tuple[nn.Module, ...]:
        """Return the network, once it is there."""
        return () if self._net is None else (self._net,)

    def arrays(self) -> Arrays:
        """Return its parameters."""
        return self._kept if self._net is None else to_arrays(self._net)

    def remember(self, arrays: Arrays) -> None:
        """Keep parameters for when the network is made."""
        self._kept = dict(arrays)


class LearnedPolicy(TargetPolicy):
    """A policy with a network of its own, which goes on from fit to fit."""

    @cached_property
    def _learned(self) -> Learned:
        return Learned()

    def modules(self) -> Sequence[nn.Module]:
        return self._learned.modules()

    def arrays(self) -> Arrays:
        return self._learned.arrays()

    def remember(self, arrays: Arrays) -> None:
        self._learned.remember(arrays)
