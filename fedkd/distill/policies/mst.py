"""MST: each example is routed to the teachers that suit the student, by a gate that learns."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import divided
from fedkd.distill.policies.base import Taught, policies
from fedkd.distill.policies.learned import LearnedPolicy
from fedkd.distill.policies.tempering import logarithm
from fedkd.errors import RunError
from fedkd.options import Count, NonNegative, options
from fedkd.rng import Rng


@policies.register("mst")
@options
class Routed(LearnedPolicy):
    """Routing over K teachers: ``p' = sum_k g_k p_k / sum_k g_k`` over the ``top`` gates g.

    ``g = softmax(G(z))`` with z the student's logits, as constants, and G a perceptron that is
    trained along, on

    ``sum_k g_k KL(p_k || q) + balance KL(uniform || mean_B g)``

    with q the student at T. The value of the first summand is taken off again, so that it shows in
    no loss. The fused target is replaced by p'. Teachers are clients' networks on a server here,
    where the authors have modalities. In their code the chosen teachers' losses are not weighted by
    the gate, which then learns from the balance alone; the weighted form, which is theirs too but
    not used, is what this is.

    The balance, and a gate for all, couple the examples of a batch: ``batch-coupled``. Limits:
    where all teachers agree, or with one, the target is theirs; a uniform gate on all teachers is
    ``fusion = "mean-probs"``.
    """

    dp = "batch-coupled"
    needs = frozenset({"teachers"})
    source = "Li et al., MST-Distill, 2025, arXiv:2507.07015; the authors' code"
    evidence = "code"

    top: Annotated[
        Count | None, Field(description="teachers of an example; none: all, by their gates")
    ] = 1
    balance: Annotated[NonNegative, Field(description="weight of an even use of teachers")] = 0.1
    hidden: Annotated[Count, Field(description="hidden units of the gate")] = 32

    @cached_property
    def _last(self) -> dict[str, Tensor]:
        return {}

    def sized(self, classes: int, teachers: int, rng: Rng) -> None:
        self._learned.make((classes, self.hidden, teachers), rng)
        self._learned.settle()

    def gates(self, logits: Tensor) -> Tensor:
        """Return the gates (B, K) of a student's logits (B, C), which add up to 1."""
        return functional.softmax(self._learned(logits.detach()), dim=1)

    def __call__(self, taught: Taught) -> Taught:
        if taught.teachers is None:
            raise RunError("policy 'mst' has no teachers to choose from")
        gates = self.gates(taught.logits)
        self._last["gates"] = gates
        chosen = gates.detach()
        k = chosen.shape[1] if self.top is None else min(self.top, chosen.shape[1])
        kept = torch.zeros_like(chosen).scatter(1, chosen.topk(k, dim=1).indices, 1.0) * chosen
        shares = kept / kept.sum(1, keepdim=True)
        probs = torch.einsum("bk,kbc->bc", shares.to(taught.teachers.dtype), taught.teachers)
        return replace(taught, probs=probs)

    def penalty(self, taught: Taught) -> Tensor:
        if taught.teachers is None:
            raise RunError("policy 'mst' has no teachers to choose from")
        gates = self._last.pop("gates")
        student = divided(taught.logits.detach(), taught.temperature)
        logq = functional.log_softmax(student, dim=1)
        apart = (taught.teachers * (logarithm(taught.teachers) - logq)).sum(2).T
        routed = (gates * apart).sum(1)
        even = -(gates.mean(0).clamp_min(1e-12) * gates.shape[1]).log().mean()
        return routed - routed.detach() + self.balance * even
