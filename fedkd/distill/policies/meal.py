"""MEAL: a discriminator beside distillation, which tells a student's answers from a teacher's."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import divided
from fedkd.distill.policies.base import Taught, policies
from fedkd.distill.policies.ctkd import reversed_gradient
from fedkd.distill.policies.learned import LearnedPolicy
from fedkd.distill.policies.tempering import logarithm
from fedkd.options import Count, Positive, options
from fedkd.rng import Rng


@policies.register("meal")
@options
class Discriminated(LearnedPolicy):
    """A discriminator of log-probabilities: ``weight/2 [BCE(D(log q), 0) + BCE(D(log p), 1)]``.

    q = softmax(z / T) is the student and p the teacher, both at T. D is a perceptron that is
    trained along; the gradient that reaches the student through it is reversed, so that D learns to
    tell them apart and the student not to be told. MEAL V2 is this on ``fusion = "mean-probs"``
    with ``objective = "soft-ce"`` and no labels. In the authors' code nothing is reversed, and
    student and discriminator descend the same loss: that is ``adversarial = false``. There D reads
    logits, by convolutions that leave a class in eight; logits have no origin, hence logarithms.

    One discriminator for all examples, moved by all of them: ``batch-coupled``. Limits: p = q
    everywhere leaves D at ``weight log 2``; the targets stay as they are.
    """

    dp = "batch-coupled"
    source = "Shen and Savvides, MEAL V2, 2020, arXiv:2009.08453; the authors' code"
    evidence = "code"

    weight: Annotated[Positive, Field(description="weight of the discriminator's loss")] = 1.0
    adversarial: Annotated[
        bool, Field(description="the student works against it; false: with it, as released")
    ] = True
    hidden: Annotated[Count, Field(description="hidden units of the discriminator")] = 16

    def sized(self, classes: int, teachers: int, rng: Rng) -> None:
        self._learned.make((classes, self.hidden, 1), rng)
        self._learned.settle()

    def __call__(self, taught: Taught) -> Taught:
        return taught

    def penalty(self, taught: Taught) -> Tensor:
        student = functional.log_softmax(divided(taught.logits, taught.temperature), dim=1)
        if self.adversarial:
            student = reversed_gradient(student, 1.0)
        said = self._learned(student).squeeze(1)
        truth = self._learned(logarithm(taught.probs.detach()).clamp_min(-50.0)).squeeze(1)
        zero, one = torch.zeros_like(said), torch.ones_like(truth)
        told = functional.binary_cross_entropy_with_logits(said, zero, reduction="none")
        known = functional.binary_cross_entropy_with_logits(truth, one, reduction="none")
        return self.weight / 2 * (told + known)
