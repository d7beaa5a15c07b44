"""What a distillation objective is: one number an example, T^2 included, teacher constant."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fedkd.registry import Registry

Temperature = float | Tensor
"""One temperature for all examples, or a tensor (B,) of one for each."""


class Objective(ABC):
    """A loss between a student's logits and a teacher's probabilities at one temperature.

    Called with student logits (B, C), teacher probabilities at temperature T (B, C) and T, one
    number or one for each example (B,); returns one value an example, (B,), **with** the factor T^2
    that keeps gradients comparable over T (Hinton, Vinyals and Dean 2015, section 2; see
    :func:`squared`). Averaging over the batch gives ``batchmean``. Tokens (B, L, V) are flattened
    to (B L, V) first.
    """

    @abstractmethod
    def __call__(self, logits: Tensor, probs: Tensor, temperature: Temperature) -> Tensor:
        """Return the loss of each example."""


objectives: Registry[type[Objective]] = Registry(
    "objective", "fedkd.distill.objectives", "objectives"
)


def divided(logits: Tensor, temperature: Temperature) -> Tensor:
    """Return ``z / T``: logits (..., C) by one temperature, or by one for each row (...,).

    >>> import torch
    >>> divided(torch.tensor([[2.0, 4.0], [2.0, 4.0]]), torch.tensor([1.0, 2.0])).tolist()
    [[2.0, 4.0], [1.0, 2.0]]
    """
    if isinstance(temperature, Tensor):
        return logits / temperature.to(logits.dtype).unsqueeze(-1)
    # A division by 1 changes no bit, and is one more operation forth and back in every step.
    return logits if temperature == 1 else logits / temperature


def squared(temperature: Temperature, like: Tensor) -> Temperature:
    """Return T^2, squared in double precision as a number is, as a tensor of the type of ``like``.

    Equal temperatures then give to the last bit what one number for all gives.
    """
    if isinstance(temperature, Tensor):
        return temperature.double().square().to(like.dtype)
    return temperature**2
