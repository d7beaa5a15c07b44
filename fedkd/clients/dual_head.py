"""Two heads on one backbone: what each of them is trained on, and what both say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.clients.client import ByNetworks, Predictor
from fedkd.clients.guided import Guide, Led
from fedkd.clients.heads import infer
from fedkd.clients.local import Batch, Compared, Term
from fedkd.clients.stacked.modules import join
from fedkd.clients.terms import HeadSupervised, alike, widened
from fedkd.data.federated import Split
from fedkd.distill.objectives.base import Objective, divided
from fedkd.models.base import BlockNet
from fedkd.rng import Rng


class Labelled(HeadSupervised):
    """The supervised head learns the labels: what ``loss/supervised`` is of a network of two."""

    name = "supervised"

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        head = join([t.head for t in terms]) if alike(Labelled, terms, "block") else None
        return Labelled(head, terms[0].block, terms[0].weight) if head else None


class OnPool(Led):
    """The network learns soft targets of public inputs: ``mean_B T^2 D(p_i || softmax(f(x_i)/T))``.

    ``x`` (Q, ...) and ``probs`` (Q, C) at ``temperature``. Every step takes the next ``size`` of
    them, fewer at the end, from one permutation after another. No private example is read, so the
    term is ``weights-only`` whatever the objective mixes, and an empty batch changes nothing.
    """

    dp = "weights-only"
    name = "pool_distil"
    teaches = True

    def __init__(
        self,
        model: BlockNet,
        x: Tensor,
        probs: Tensor,
        *,
        objective: Objective,
        temperature: float,
        weight: float,
        size: int,
        rng: Rng,
        guide: Guide | None = None,
    ) -> None:
        self.model, self.x, self.probs = model, x, probs
        self.objective, self.temperature, self.weight = objective, temperature, weight
        self.size, self.rng = size, rng
        self._ahead, self._passes = list[Tensor](), 0
        self.led_by(guide)

    def __call__(self, batch: Batch) -> Tensor:
        index = self._drawn().to(self.x.device)
        logits = widened(self.model(self.x.index_select(0, index)))
        probs = self.probs.index_select(0, index)
        return self.taught(self.objective, logits, probs, self.temperature, None).mean()

    def compared(self, batch: Batch) -> Compared:
        # Of the whole pool, in whatever parts examples are looked at.
        logits = widened(self.model(self.x))
        return Compared(divided(logits, self.temperature), self.probs, "@pool")

    def _drawn(self) -> Tensor:
        """Return the positions of the next step."""
        if not self._ahead:
            order = torch.randperm(len(self.x), generator=self.rng.child(self._passes).torch())
            self._ahead = list(reversed(order.split(self.size)))
            self._passes += 1
        return self._ahead.pop()


def mixed_heads(ce: Tensor, kd: Tensor, mix: float, sharpness: float) -> Tensor:
    """Return ``log(a softmax(z_ce) + (1 - a) softmax(z_kd / b))`` of logits (B, C).

    a is ``mix``, b ``sharpness``; a = 1 is the first head alone, a = 0 the second.
    Source: Kang et al., arXiv:2505.07675, the prediction at inference.

    >>> ce, kd = torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]])
    >>> mixed_heads(ce, kd, 0.5, 2.0).exp()
    tensor([[0.6155, 0.3845]])
    """
    first, second = functional.log_softmax(ce, dim=1), functional.log_softmax(kd / sharpness, dim=1)
    if mix in (0, 1):
        return first if mix else second
    return torch.logaddexp(first + math.log(mix), second + math.log1p(-mix))


def dual(model: BlockNet, head: nn.Module, block: str, mix: float, sharpness: float) -> Predictor:
    """Return the predictors of a network with a supervised ``head`` on ``block``, by one pass.

    ``personal``: :func:`mixed_heads`; ``ce_head`` and ``kd_head``: each head alone.
    """

    def predict(x: Tensor) -> dict[str, Tensor]:
        kd, features = model.forward_with_features(x, (block,))
        ce = head(features[block])
        return {"personal": mixed_heads(ce, kd, mix, sharpness), "ce_head": ce, "kd_head": kd}

    return ByNetworks(f"dual heads {block} {mix} {sharpness}", (model, head), predict)


def answers(
    model: BlockNet, head: nn.Module, block: str, x: Tensor, mix: float, sharpness: float
) -> Tensor:
    """Return what both heads say together of inputs now: log-probabilities (n, C), as constants."""
    kd, features = infer(model, x, (block,))
    with torch.inference_mode():
        said = mixed_heads(head(features[block]), kd, mix, sharpness)
    # Outside, so that what learns from them can keep them for its gradients.
    return said.clone()
