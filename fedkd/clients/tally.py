"""Sums of losses over a fit: kept where they arise, and looked at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Tally:
    """Sums of losses over examples: kept where they arise, and looked at once, at the end.

    A look at a number waits for the device, and an addition costs a small network as much as a
    layer. Every so often they are added up, so that a long fit does not hold all of them.
    """

    often = 512

    def __init__(self) -> None:
        self.steps = self.examples = 0
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self._sums: Tensor | None = None

    def add(self, losses: Sequence[Tensor], examples: int, summed: bool = False) -> None:
        """Note a step: a mean over its examples of each term, or one tensor of sums (J,)."""
        self.steps += 1
        self.examples += examples
        self._losses += losses
        self._sizes.append(1 if summed else examples)
        if len(self._sizes) == self.often:
            self._fold()

    def sums(self) -> Tensor:
        """Return the sum over all examples of each term's loss (J,), float64 on the device."""
        if self._sizes:
            self._fold()
        return torch.zeros(0, dtype=torch.float64) if self._sums is None else self._sums

    def _fold(self) -> None:
        found = torch.stack(self._losses).detach().double().view(len(self._sizes), -1)
        sizes = torch.tensor(self._sizes, dtype=torch.float64, device=found.device)
        sums = sizes @ found
        self._sums = sums if self._sums is None else self._sums + sums
        self._losses, self._sizes = [], []
