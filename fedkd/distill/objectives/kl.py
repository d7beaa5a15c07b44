"""Kullback-Leibler divergence, the objective of Hinton, Vinyals and Dean (2015)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import Objective, objectives
from fedkd.options import options


@objectives.register("kl")
@options
class KullbackLeibler(Objective):
    """Kullback-Leibler divergence between the softened teacher and student.

    forward: ``T^2 sum_c p_c (log p_c - log q_c)``; reverse: ``T^2 sum_c q_c (log q_c - log p_c)``,
    with p the teacher and q = softmax(z / T) the student. Zero exactly where p = q.

    >>> KullbackLeibler()(torch.zeros(1, 2), torch.full((1, 2), 0.5), 2.0)
    tensor([0.])
    """

    direction: Annotated[
        Literal["forward", "reverse"],
        Field(description="forward covers the teacher's modes, reverse seeks one of them"),
    ] = "forward"

    def __call__(self, logits: Tensor, probs: Tensor, temperature: float) -> Tensor:
        student = functional.log_softmax(logits / temperature, dim=1)
        teacher = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
        if self.direction == "reverse":
            value = (student.exp() * (student - teacher)).sum(1)
        else:
            value = (probs * (teacher - student)).sum(1)
        return value * temperature**2
