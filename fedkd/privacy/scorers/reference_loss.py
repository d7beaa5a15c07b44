"""Reference loss: an example is as private as a small model of public data finds it surprising.

The reference is softmax regression, whose fit is convex: nothing random beside the two folds.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from fedkd.data.federated import Split
from fedkd.errors import ConfigError
from fedkd.options import Count, NonNegative, options
from fedkd.privacy.scorers.base import ExampleScorer, scorers
from fedkd.rng import Rng
from fedkd.types import Task


@scorers.register("reference-loss")
@options
class ReferenceLoss(ExampleScorer):
    """Negative log-likelihood of the label under a model of the public pool, in nats.

    The pool itself is scored in two folds, each by the model of the other, since a model is not
    surprised by what it has seen. Needs the labels of the pool. An idea of the literature
    on rare items (Wu, Gong and Xiong, FL4NLP 2022, where it is a language model's perplexity).
    """

    l2: Annotated[NonNegative, Field(description="penalty on the reference model's weights")] = 1e-3
    steps: Annotated[Count, Field(description="iterations of L-BFGS, at most")] = 60

    def score_public(self, pool: Split, task: Task, rng: Rng) -> Tensor:
        _labelled(pool)
        order = torch.randperm(len(pool), generator=rng.child("folds").torch())
        halves = order[: len(pool) // 2], order[len(pool) // 2 :]
        found = torch.empty(len(pool), dtype=torch.float64)
        x, y = pool.x.cpu(), pool.y.cpu()
        for mine, other in (halves, halves[::-1]):
            found[mine] = self._losses(Split(x[mine], y[mine]), Split(x[other], y[other]), task)
        return found

    def score(self, data: Split, pool: Split, task: Task, rng: Rng) -> Tensor:
        _labelled(pool)
        return self._losses(data, pool, task)

    def _losses(self, data: Split, reference: Split, task: Task) -> Tensor:
        """Return the losses (n,) of ``data`` under the model of ``reference``."""
        x, y = _flat(reference), reference.y.cpu()
        centre = x.mean(0) if len(x) else torch.zeros(x.shape[1], dtype=x.dtype)
        spread = (x - centre).square().mean().sqrt().clamp_min(1e-12) if len(x) else 1.0
        weights = torch.zeros(x.shape[1] + 1, task.classes, dtype=torch.float64)
        if len(x):
            weights = self._fit(_with_one((x - centre) / spread), y, weights)
        logits = _with_one((_flat(data) - centre) / spread) @ weights
        return functional.cross_entropy(logits, data.y.cpu(), reduction="none")

    def _fit(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        weights = weights.requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=self.steps, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            penalty = weights[:-1].square().sum() * (self.l2 / 2)
            loss = functional.cross_entropy(x @ weights, y) + penalty
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)
        return weights.detach()


def _flat(split: Split) -> Tensor:
    return split.x.cpu().double().flatten(1)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def _labelled(pool: Split) -> None:
    if bool((pool.y < 0).any()):
        raise ConfigError(
            "privacy.swing.scorer = 'reference-loss' needs the labels of the public pool, and the "
            "pool from data.public.source has none; set privacy.swing.scorer = 'knn', which needs "
            "none, or leave data.public.source out"
        )
