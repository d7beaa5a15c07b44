"""Distillation over the classes that an example is not: what FedNTD holds on to.

A client that forgets, forgets the classes it does not see. Leaving the true class out of the
comparison lets it learn its labels freely and keeps what the teacher knows of all the others.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.kl import KullbackLeibler


def not_true(logits: Tensor, y: Tensor) -> Tensor:
    """Return ``logits`` (B, C) without the one of the true class ``y`` (B,): (B, C - 1), in order.

    >>> not_true(torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1])).tolist()
    [[1.0, 2.0], [0.0, 2.0]]
    """
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(y), -1)
    return logits.gather(1, others + (others >= y[:, None]))


def not_true_divergence(
    logits: Tensor, teacher_logits: Tensor, y: Tensor, temperature: float
) -> Tensor:
    """Return the KL divergence from teacher to student over the classes that are not true, (B,).

    ``T^2 sum_{c != y} p_c (log p_c - log q_c)`` with ``p = softmax(z_teacher^{-y} / T)`` and
    ``q = softmax(z^{-y} / T)``, z^{-y} (B, C - 1) being logits without the true class's, so that
    both are distributions again. The true class's logit gets no gradient, the teacher none at all.
    Limits: 0 for two classes, whose one remaining class has all the probability.
    Source: Lee et al., Preservation of the Global Knowledge by Not-True Distillation in Federated
    Learning, NeurIPS 2022.
    """
    teacher = functional.softmax(not_true(teacher_logits.detach(), y) / temperature, dim=1)
    return KullbackLeibler()(not_true(logits, y), teacher, temperature)
