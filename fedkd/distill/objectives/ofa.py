"""Soft cross-entropy whose target is lifted at the true class: OFA-KD's, on the final logits."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import (
    Inner,
    Objective,
    Temperature,
    divided,
    labelled,
    objectives,
    squared,
)
from fedkd.options import Names, NotNegative, Positive, options


@objectives.register("ofa")
@options
class EnhancedTarget(Objective):
    """Cross-entropy with lifted targets: ``-T^2 sum_c ((p_c + 1{c=y})^gamma - 1{c=y}) log q_c``.

    p is the teacher, q = softmax(z / T) the student, y the true class. gamma above 1 lifts the
    target of the true class and lowers all others, so that teachers of another architecture are
    heard where they are right; 1 is soft-ce, whatever the label. The authors' T is 1, and they have
    no factor T^2; it is here so that gamma = 1 is soft-ce at every T. The targets do not sum to 1:
    but for gamma = 1 the gradient is not 0 at the teacher, and grows with T.

    Without a label, y is the teacher's likeliest class, believed with its probability b, and its
    target is what is expected then: ``b ((p_y + 1)^gamma - 1) + (1 - b) p_y^gamma``. The belief
    stands outside the power, since ``(p_y + b)^gamma - b`` is below 0 for an unsure teacher, and
    would push the student away from what it holds likeliest.

    With ``branches`` inner blocks of the student are taught the same, each by a head of its own
    that nobody predicts with: the sum over them of ``branch_weight`` times the loss of the head's
    logits, at ``branch_gamma``. The authors' heads are convolutions or transformer blocks down to
    the last stage's width; here they are perceptrons on pooled features, so that any student has
    them: this part is a reconstruction. They go on from round to round on a client, and begin anew
    on a server. A network that is taught at a block already, as FedD2S's cuts, gets none there.
    """

    source = "Hao et al., One-for-All, NeurIPS 2023, arXiv:2310.19444; the authors' code"
    evidence = "code"
    labels = True

    gamma: Annotated[
        Positive, Field(description="how much the true class's target is lifted; 1 is soft-ce")
    ] = 1.5
    branches: Annotated[
        Names, Field(description="inner blocks that are taught as well, or all; empty: none")
    ] = ()
    branch_weight: Annotated[Positive, Field(description="weight of each branch")] = 1.0
    branch_gamma: Annotated[
        Positive | None, Field(description="gamma of the branches; none: that of the output")
    ] = None
    branch_hidden: Annotated[
        NotNegative, Field(description="hidden units of a branch's head; 0: linear")
    ] = 64

    def inner(self) -> Inner | None:
        if not self.branches:
            return None
        blocks = () if self.branches == ("all",) else tuple(self.branches)
        taught = EnhancedTarget(gamma=self.branch_gamma or self.gamma)
        return Inner(taught, blocks, self.branch_weight, self.branch_hidden)

    def __call__(
        self,
        logits: Tensor,
        probs: Tensor,
        temperature: Temperature,
        labels: Tensor | None = None,
    ) -> Tensor:
        student = functional.log_softmax(divided(logits, temperature), dim=1)
        target = lifted(probs, *labelled(probs, labels), self.gamma)
        return -(target * student).sum(1) * squared(temperature, logits)


def lifted(probs: Tensor, y: Tensor, belief: Tensor, gamma: float) -> Tensor:
    """Return the targets (B, C) of :class:`EnhancedTarget` for classes ``y`` (B,), all >= 0.

    >>> p, y = torch.tensor([[0.25, 0.75]]), torch.tensor([0])
    >>> lifted(p, y, torch.ones(1), 2.0)
    tensor([[0.5625, 0.5625]])
    """
    at = probs.gather(1, y[:, None])
    b = belief[:, None]
    # expm1 and log1p, so that small probabilities do not vanish beside the 1.
    true = b * torch.expm1(gamma * torch.log1p(at)) + (1 - b) * at.pow(gamma)
    return probs.pow(gamma).scatter(1, y[:, None], true)
