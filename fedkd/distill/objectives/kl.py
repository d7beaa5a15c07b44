"""Kullback-Leibler divergence, the objective of Hinton, Vinyals and Dean (2015)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import (
    Objective,
    Temperature,
    divided,
    objectives,
    squared,
)
from fedkd.options import options


@objectives.register("kl")
@options
class KullbackLeibler(Objective):
    """Kullback-Leibler divergence from teacher to student: ``T^2 sum_c p_c (log p_c - log q_c)``.

    p is the teacher, q = softmax(z / T) the student; zero exactly where p = q. The forward
    direction: the student covers all that the teacher holds possible.

    >>> KullbackLeibler()(torch.zeros(1, 2), torch.full((1, 2), 0.5), 2.0)
    tensor([0.])
    """

    def __call__(self, logits: Tensor, probs: Tensor, temperature: Temperature) -> Tensor:
        student, teacher = _logs(logits, probs, temperature)
        return (probs * (teacher - student)).sum(1) * squared(temperature, logits)


@objectives.register("reverse-kl")
@options
class ReverseKullbackLeibler(Objective):
    """Kullback-Leibler divergence from student to teacher: ``T^2 sum_c q_c (log q_c - log p_c)``.

    The reverse direction: the student settles on one of the teacher's modes.
    """

    def __call__(self, logits: Tensor, probs: Tensor, temperature: Temperature) -> Tensor:
        student, teacher = _logs(logits, probs, temperature)
        return (student.exp() * (student - teacher)).sum(1) * squared(temperature, logits)


def _logs(logits: Tensor, probs: Tensor, temperature: Temperature) -> tuple[Tensor, Tensor]:
    student = functional.log_softmax(divided(logits, temperature), dim=1)
    return student, probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
