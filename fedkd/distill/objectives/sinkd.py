"""KL and the transport between the batches of student and teacher: Sinkhorn distillation."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import (
    Objective,
    Temperature,
    divided,
    objectives,
    squared,
)
from fedkd.distill.objectives.kl import KullbackLeibler
from fedkd.distill.sinkhorn import debiased, transport
from fedkd.options import Count, NonNegative, Positive, options


@objectives.register("sinkd")
@options
class Sinkhorn(Objective):
    """KL plus transport over the batch: ``T^2 (a KL(p_i || q_i) + b sum_j P_ij |q_i - p_j|_1)``.

    p is the teacher, q = softmax(z / T) the student, P the entropic transport plan between the rows
    of the two, a = kl_weight, b = ot_weight: each example's KL and its share of the cost. The mean
    over the batch has the cost divided by B; the authors' code has the sum times 0.001 or so.
    Batch-coupled: the transport ties no student to its own teacher, and is the same if the students
    change places, so it must ride on a divergence by example; ``ot_weight = 0`` leaves that, times
    a. The distances cost B^2 C, each iteration 2 B^2.

    The published cost is not 0 at the teacher but draws students together, since its plan is
    blurred. ``debiased`` (default) takes half of what student and teacher cost with themselves from
    it, which is 0 at the teacher and costs three plans; false is the paper's letter. Like tv it has
    a kink there, and falls like 1 / T, so that T^2 makes it grow with T.
    """

    dp = "batch-coupled"
    twice = False
    source = "Cui et al., SinKD, LREC-COLING 2024, arXiv:2402.17110; the authors' code"
    evidence = "code"

    kl_weight: Annotated[NonNegative, Field(description="weight of the divergence by example")] = (
        0.9
    )
    ot_weight: Annotated[
        NonNegative,
        Field(description="weight of the transport, a mean over the batch; 0 leaves kl"),
    ] = 0.8
    eps: Annotated[
        Positive,
        Field(description="entropy of the plan, in units of |q - p|_1, which is at most 2"),
    ] = 0.1
    iterations: Annotated[
        Count, Field(description="Sinkhorn iterations; a smaller eps wants more")
    ] = 20
    debiased: Annotated[
        bool, Field(description="take off what the entropy adds, so that the teacher costs 0")
    ] = True

    def __call__(
        self,
        logits: Tensor,
        probs: Tensor,
        temperature: Temperature,
        labels: Tensor | None = None,
    ) -> Tensor:
        values = self.kl_weight * KullbackLeibler()(logits, probs, temperature)
        if not self.ot_weight:
            return values
        student = functional.softmax(divided(logits, temperature), dim=1)
        cost = debiased if self.debiased else transport
        moved = cost(student, probs, self.eps, self.iterations)
        return values + self.ot_weight * moved * squared(temperature, logits)
