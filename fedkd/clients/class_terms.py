"""Loss terms that hold a network near what a federation knows of each class.

Global features and soft predictions are constants: no gradient reaches the clients they came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkd.clients.guided import Guide, Led, led
from fedkd.clients.local import Batch, Compared, Term
from fedkd.clients.stacked.modules import signature
from fedkd.clients.terms import OnWeights, alike, widened
from fedkd.data.federated import Split
from fedkd.distill.objectives.base import Objective, divided
from fedkd.distill.targets import Targets, joined
from fedkd.models.base import HEAD, POOLED, BlockNet
from fedkd.types import Task


class FeatureMatch(Term):
    """Mean squared distance of features to those of their class, ``||h - c_y||^2 / d``.

    h (B, d) are the pooled features behind ``block``, c_y the target of the example's label. An
    example of a class without a target contributes 0, and no gradient: it is masked, and not
    pulled towards zeros. Source: Tan et al., FedProto, AAAI 2022, the regularizer of the local
    loss; Chen et al., FedHKD, ICLR 2023, the third term.
    """

    name = "feature"

    def __init__(self, targets: Targets, block: str, weight: float) -> None:
        self.targets, self.block, self.weight = targets, block, weight

    def __call__(self, batch: Batch) -> Tensor:
        rows, mask = self.targets(batch.y, batch.index)
        loss = (batch.features[self.block] - rows.detach()).square().mean(1)
        return torch.where(mask, loss, torch.zeros_like(loss))

    def at(self) -> frozenset[str]:
        return frozenset({self.block})

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        targets = joined([t.targets for t in terms], [split.y for split in data])
        if targets is None or not alike(FeatureMatch, terms, "block"):
            return None
        return FeatureMatch(targets, terms[0].block, terms[0].weight)


class HeadOnClasses(Led):
    """Distillation of a head on global features: ``mean_c T^2 D(q_c || softmax(g(h_c) / T))``.

    ``inputs`` (P, ...) are the global features h_c of the P classes that have one, in the shape
    that ``head`` g reads; ``probs`` (P, C) their global soft predictions q_c at ``temperature``.
    Classes that nobody holds are left out of the mean. It reads no example, and moves the head
    alone. To the policies of a ``guide`` each class is an example, whose label is the class itself,
    ``labels`` (P,); nothing else is told them. Source: Chen et al., FedHKD, ICLR 2023, the second
    term of the local loss.
    """

    dp = "weights-only"
    name = "head_distil"
    teaches = True

    def __init__(
        self,
        head: nn.Module,
        inputs: Tensor,
        probs: Tensor,
        objective: Objective,
        temperature: float,
        weight: float,
        guide: Guide | None = None,
        labels: Tensor | None = None,
    ) -> None:
        self.head, self.inputs, self.probs = head, inputs.detach(), probs.detach()
        self.objective, self.temperature, self.weight = objective, temperature, weight
        self.labels = labels
        self.led_by(guide)

    def __call__(self, batch: Batch) -> Tensor:
        logits = widened(self.head(self.inputs))
        if self.guide is None:
            return self.objective(logits, self.probs, self.temperature).mean()
        rows = (logits, self.probs, self.temperature, self.labels)
        return self.guide.loss(self.objective, *rows, told=False).mean()

    def compared(self, batch: Batch) -> Compared:
        logits = widened(self.head(self.inputs))
        return Compared(divided(logits, self.temperature), self.probs, "@head")

    @classmethod
    def merged(cls, terms: Sequence[Self], data: Sequence[Split]) -> Term | None:
        shapes = {(t.inputs.shape, t.probs.shape, signature(t.head)) for t in terms}
        same = alike(HeadOnClasses, terms, "objective", "temperature") and not led(terms)
        if not same or len(shapes) != 1:
            return None
        named = [dict(t.head.named_parameters()) for t in terms]
        return HeadsOnClasses(terms, {f"{HEAD}.{n}": [own[n] for own in named] for n in named[0]})


class HeadsOnClasses(OnWeights):
    """:class:`HeadOnClasses` of K clients whose ``head`` is that of the network that trains."""

    name = "head_distil"

    def __init__(
        self, terms: Sequence[HeadOnClasses], parameters: Mapping[str, Sequence[Tensor]]
    ) -> None:
        super().__init__(terms[0].weight, parameters)
        self.first = terms[0]
        self.inputs = torch.stack([t.inputs for t in terms])
        self.probs = torch.stack([t.probs for t in terms])

    def __call__(self, batch: Batch) -> Tensor:
        def one(weights: dict[str, Tensor], inputs: Tensor, probs: Tensor) -> Tensor:
            logits = functional_call(self.first.head, weights, (inputs,))
            return self.first.objective(logits, probs, self.first.temperature).mean()

        weights = {n.removeprefix(f"{HEAD}."): w for n, w in self.read(batch).items()}
        active = len(next(iter(weights.values())))
        found: Tensor = torch.vmap(one)(weights, self.inputs[:active], self.probs[:active])
        return found


def head_inputs(model: BlockNet, task: Task, features: Tensor) -> Tensor:
    """Return pooled features (P, d) of the last block in the shape that the head reads.

    The inverse of :func:`~fedkd.models.base.pool` in shape: vectors stay, tokens become one token
    (P, 1, width), maps become maps of at most 4x4 cells (P, channels, h, w). Exact for heads that
    read vectors; for heads that average over a map or over tokens an approximation, since the
    head then sees the pooled cells and not each pixel or token.
    """
    with torch.no_grad():
        like = features.new_zeros(1, *task.input_shape)
        hidden = model.raw_features(like, model.block_names[-1])
    if hidden.dim() == 3:
        return features.unsqueeze(1)
    if hidden.dim() == 4:
        height, width = (min(side, POOLED) for side in hidden.shape[2:])
        return features.view(len(features), hidden.shape[1], height, width)
    return features
