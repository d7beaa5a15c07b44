"""Soft targets: what a student is taught, by class or by example, with absences masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Targets(Protocol):
    """Gives the soft targets of a batch: probabilities (B, C) and a mask (B,) of who has one."""

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets of examples with labels ``y`` at positions ``index``."""


@dataclass(frozen=True)
class ClassTargets:
    """One soft target for each class: an example is taught the target of its label.

    ``probs`` (C, C): row c is the target of class c; ``mask`` (C,): False where nobody could say.
    """

    probs: Tensor
    mask: Tensor

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.probs[y], self.mask[y]


@dataclass(frozen=True)
class SampleTargets:
    """One soft target for each training example, ``probs`` (n, C)."""

    probs: Tensor

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.probs[index], torch.ones_like(y, dtype=torch.bool)
