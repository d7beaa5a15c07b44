"""What a distillation objective is: one number an example, T^2 included, teacher constant."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fedkd.registry import Registry


class Objective(ABC):
    """A loss between a student's logits and a teacher's probabilities at one temperature.

    Called with student logits (B, C), teacher probabilities at temperature T (B, C) and T; returns
    one value an example, (B,), **with** the factor T^2 that keeps gradients comparable over T
    (Hinton, Vinyals and Dean 2015, section 2). Averaging over the batch gives ``batchmean``.
    """

    @abstractmethod
    def __call__(self, logits: Tensor, probs: Tensor, temperature: float) -> Tensor:
        """Return the loss of each example."""


objectives: Registry[type[Objective]] = Registry(
    "objective", "fedkd.distill.objectives", "objectives"
)
