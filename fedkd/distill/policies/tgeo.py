"""TGeo: how much of the teacher and how much of the truth, for each example, learned on others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from fedkd.distill.objectives.base import divided, labelled
from fedkd.distill.policies.base import TargetPolicy, Taught, policies
from fedkd.distill.policies.learned import Learned
from fedkd.errors import ConfigError
from fedkd.options import Fraction, Positive, options
from fedkd.rng import Rng
from fedkd.types import Arrays

WIDTHS = (32, 16, 1)
BETAS, EPS = (0.9, 0.999), 1e-8


class Ratio(Learned):
    """The perceptron behind the ratios, its Adam, and the teacher's mean by class so far."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.sums = self.counts = torch.zeros(0)

    def begin(self, width: int, classes: int, start: float, rng: Rng) -> None:
        """Make the perceptron for ``width`` numbers an example, or go on from what was kept."""
        *_, weight, bias = self.make((width, *WIDTHS), rng).parameters()
        with torch.no_grad():
            weight.mul_(0.1)
            bias.fill_(math.log(start / (1 - start)))
        self.settle()
        self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.net.parameters()]
        self.sums = torch.zeros(classes, classes, dtype=torch.float64)
        self.counts = torch.zeros(classes, dtype=torch.float64)
        if "steps" in self._kept:
            self.steps = int(self._kept["steps"][0])
            for name, value in self._others().items():
                value.copy_(torch.from_numpy(np.array(self._kept[name])))

    def mean(self, probs: Tensor, y: Tensor) -> Tensor:
        """Count a batch (B, C) in, and return the teacher's means (B, C) of its classes."""
        self.sums, self.counts = self.sums.to(probs.device), self.counts.to(probs.device)
        self.sums.index_add_(0, y, probs.detach().double())
        self.counts.index_add_(0, y, torch.ones_like(y, dtype=torch.float64))
        return (self.sums[y] / self.counts[y, None]).to(probs.dtype)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float) -> None:
        """Take a step of Adam (Kingma and Ba, ICLR 2015)."""
        self.steps += 1
        both = zip(self.net.parameters(), gradients, self.moments, strict=True)
        for p, g, (first, second) in both:
            first.lerp_(g.to(first), 1 - BETAS[0])
            second.lerp_(g.to(second).square(), 1 - BETAS[1])
            mean = first / (1 - BETAS[0] ** self.steps)
            spread = (second / (1 - BETAS[1] ** self.steps)).sqrt()
            p.sub_((lr * mean / (spread + EPS)).to(p.device))

    def _others(self) -> dict[str, Tensor]:
        moments = {
            f"adam/{i}/{j}": moment
            for i, two in enumerate(self.moments)
            for j, moment in enumerate(two)
        }
        return {**moments, "sums": self.sums, "counts": self.counts}

    def arrays(self) -> Arrays:
        if not self.modules():
            return super().arrays()
        others = {name: value.cpu().numpy().copy() for name, value in self._others().items()}
        return {**super().arrays(), **others, "steps": np.array([self.steps], dtype=np.int64)}


@policies.register("tgeo")
@options
class Trilateral(TargetPolicy):
    """A learned ratio for each example: ``p' = a p + (1 - a) onehot(y)``, ``a = sigmoid(F(phi))``.

    phi are student S, teacher T, truth G and the mean M of the teacher's probabilities over the
    examples of a class, and the squared differences M - S, G - S, T - S, T - G, M - G: 9 C numbers
    (``"edges"``: the last 5 C). F is a perceptron 32-16-1. It does not learn along with the
    student, for which a ratio of 1 or 0 would be cheapest, but from examples of the client that
    nobody is trained on (``data.validation``): by Adam on

    ``dL_val(theta') / dw``, ``theta' = theta - eta grad_theta mean_B loss(a_w)``,

    the gradient through one unrolled step (:class:`~fedkd.clients.bilevel.Unrolled`), in closed
    form ``dL_val / da_n = -(eta / B) <grad L_val(theta'), d grad loss_n / da_n>``. In the authors'
    code this gradient is cut off, and F stays as it began. A reconstruction in two places: theirs
    mixes the losses, with the teacher at T and the truth at 1, where here the targets are mixed, as
    every objective can be asked about; and their M is taken over all data before training.

    What one example is taught then depends on validation examples and on the other ones:
    ``batch-coupled``, and refused under example-level DP, where no accountant counts the former.
    Without validation examples F stays as it began. Limits: there, a is ``start`` but for the small
    weights that F begins with; a = 1 is no policy.
    """

    dp = "batch-coupled"
    labels = True
    needs = frozenset({"validation"})
    source = "Hu et al., TGeo-KD, ICLR 2024, arXiv:2312.15112; the authors' code"
    evidence = "reconstruction"

    start: Annotated[
        Fraction, Field(description="the teacher's share of a target in the beginning")
    ] = 0.5
    lr: Annotated[Positive, Field(description="learning rate of the ratio (Adam)")] = 1e-2
    features: Annotated[
        Literal["all", "edges"], Field(description="what the ratio reads: all, or differences")
    ] = "all"

    def __post_init__(self) -> None:
        if not 0 < self.start < 1:
            raise ConfigError(
                f"policy 'tgeo': start = {self.start:g} must lie between 0 and 1, where the ratio "
                "can still learn; for all of one of them use 'ground-truth'"
            )

    @cached_property
    def _ratio(self) -> Ratio:
        return Ratio()

    def sized(self, classes: int, teachers: int, rng: Rng) -> None:
        width = (9 if self.features == "all" else 5) * classes
        self._ratio.begin(width, classes, self.start, rng)

    def modules(self) -> Sequence[nn.Module]:
        return self._ratio.modules()

    def arrays(self) -> Arrays:
        return self._ratio.arrays()

    def remember(self, arrays: Arrays) -> None:
        self._ratio.remember(arrays)

    def ratios(self, taught: Taught) -> tuple[Tensor, Tensor]:
        """Return the teacher's share a (B, 1) of each target, and the truth G (B, C)."""
        y, _ = labelled(taught.probs, taught.labels)
        s = functional.softmax(divided(taught.logits.detach(), taught.temperature), dim=1)
        t = taught.probs
        g = functional.one_hot(y, t.shape[1]).to(t.dtype)
        m = self._ratio.mean(t, y)
        edges = [(m - s) ** 2, (g - s) ** 2, (t - s) ** 2, (t - g) ** 2, (m - g) ** 2]
        told = [s, t, g, m, *edges] if self.features == "all" else edges
        return self._ratio(torch.cat(told, dim=1)).sigmoid(), g

    def __call__(self, taught: Taught) -> Taught:
        a, truth = self.ratios(taught)
        return replace(taught, probs=a * taught.probs + (1 - a) * truth)

    def learn(self, gradients: Sequence[Tensor]) -> None:
        self._ratio.step(gradients, self.lr)
