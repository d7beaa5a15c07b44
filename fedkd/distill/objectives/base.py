"""What a distillation objective is: one number an example, T^2 included, teacher constant."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.data.federated import UNLABELLED
from fedkd.registry import Registry
from fedkd.types import DpClass

Temperature = float | Tensor
"""One temperature for all examples, or a tensor (B,) of one for each."""


@dataclass(frozen=True)
class Inner:
    """Branches at inner blocks: by an objective, ``weight`` times what the output counts.

    ``blocks`` of the student (empty: all but the head); each has a head of ``hidden`` units on its
    pooled features (0: linear).
    """

    objective: Objective
    blocks: tuple[str, ...]
    weight: float
    hidden: int


class Objective(ABC):
    """A loss between a student's logits and a teacher's probabilities at one temperature.

    Called with student logits (B, C), teacher probabilities at temperature T (B, C), T, one number
    or one for each example (B,), and, where it wants them, the true classes (B,); returns one value
    an example, (B,). Averaging over the batch gives ``batchmean``. Tokens (B, L, V) are flattened
    to (B L, V) first. Gradients are with regard to the student's logits only.

    What each says of itself:

    ``dp``: ``per-example`` values depend on their own example alone and may be clipped one by one.
    ``batch-coupled`` ones mix the examples of a batch: they are refused under example-level DP, and
    allowed on public and generated inputs.

    ``labels``: whether it reads the true class. Where there is none, what stands in for it is
    :func:`labelled`.

    ``scaled``: whether the factor T^2 is in its values that keeps gradients comparable over T
    (Hinton, Vinyals and Dean 2015, section 2; see :func:`squared`).

    ``twice``: whether its gradient can be differentiated again, by policies that look a step ahead.

    ``source`` is its paper; ``evidence`` says what of it was read: the ``paper``, its authors'
    ``code``, or neither in full (``reconstruction``).
    """

    dp: DpClass = "per-example"
    labels: ClassVar[bool] = False
    scaled: ClassVar[bool] = True
    twice: ClassVar[bool] = True
    source: ClassVar[str] = ""
    evidence: ClassVar[Literal["paper", "code", "reconstruction"]] = "paper"

    def inner(self) -> Inner | None:
        """Return how inner blocks of the student are taught as well; None: they are not."""
        return None

    @abstractmethod
    def __call__(
        self,
        logits: Tensor,
        probs: Tensor,
        temperature: Temperature,
        labels: Tensor | None = None,
    ) -> Tensor:
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


def logs(logits: Tensor, probs: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    """Return the logarithms of both distributions at T: ``log softmax(z / T)`` and ``log p``.

    A probability of zero counts as the smallest that its type can say, so that 0 log 0 is 0.
    """
    student = functional.log_softmax(divided(logits, temperature), dim=1)
    return student, probs.clamp_min(torch.finfo(probs.dtype).tiny).log()


def labelled(probs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the class of each example (B,) and how much it is believed (B,).

    The true class where it is known, with belief 1; else the teacher's likeliest, with its
    probability. The one rule for every objective that wants a label where nobody has one, as on a
    public pool; of several likeliest classes it is the first.

    >>> import torch
    >>> p = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.75, 0.25]])
    >>> labelled(p, torch.tensor([0, -1, -1]))
    (tensor([0, 0, 0]), tensor([1.0000, 0.5000, 0.7500]))
    """
    belief, guess = probs.max(dim=1)
    if labels is None:
        return guess, belief
    known = labels != UNLABELLED
    return torch.where(known, labels, guess), torch.where(known, torch.ones_like(belief), belief)
