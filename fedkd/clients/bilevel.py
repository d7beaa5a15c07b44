"""One unrolled step of training: what a loss on other examples says of what was just taught."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call
from torch.nn import functional

from fedkd.clients.local import Occasion
from fedkd.clients.stacked.written_out import WrittenOut
from fedkd.data.federated import UNLABELLED, Split

ROWS = 256
"""Validation examples that a step looks at, drawn afresh if there are more."""


@dataclass(eq=False)
class Unrolled:
    """A step of a fit, and how its outcome would change with the gradients of the logits.

    With ``theta' = theta - eta J' r`` for the gradients r (B, C) of the loss with regard to the
    logits and their Jacobian J at theta, the loss L on validation examples has

    ``dL(theta') / dr = -eta J grad L(theta')``,

    exact for plain gradient descent on this loss alone. Optimizers with a memory, and other terms,
    take another step than that.
    """

    occasion: Occasion
    validation: Split
    drawn: int = field(default=0, init=False)

    def slopes(self, index: Tensor, r: Tensor) -> Tensor:
        """Return ``dL(theta') / dr`` (B, C) for examples at ``index`` (B,) and r (B, C)."""
        model, eta = self.occasion.model, self.occasion.lr
        rest: dict[str, Tensor] = {k: p for k, p in model.named_parameters() if not p.requires_grad}
        # Copies: what a layer counts of examples is for the step itself to count.
        rest |= {k: b.clone() for k, b in model.named_buffers()}
        weights: dict[str, Tensor] = {}
        for k, p in model.named_parameters():
            if p.requires_grad:
                weights[k] = p.detach().requires_grad_()
        theta = list(weights.values())
        with WrittenOut():
            # Fused attention has no second derivative.
            logits = functional_call(model, {**weights, **rest}, (self.occasion.data.x[index],))
        # J'u is linear in u, so that its derivative along v, with regard to u, is J v.
        u = r.view_as(logits).clone().requires_grad_()
        step = grad(logits, theta, u, create_graph=True)
        after = {
            k: (p - eta * g).detach().requires_grad_()
            for (k, p), g in zip(weights.items(), step, strict=True)
        }
        x, y = self._batch()
        answers = functional_call(model, {**after, **rest}, (x,)).flatten(0, -2)
        loss = functional.cross_entropy(answers, y.flatten(), ignore_index=UNLABELLED)
        slope = grad(loss, list(after.values()))
        (moved,) = grad(step, u, slope)
        return -eta * moved.view_as(r)

    def _batch(self) -> tuple[Tensor, Tensor]:
        n, held = len(self.validation), self.validation
        if n <= ROWS:
            return held.x, held.y
        self.drawn += 1
        rng = self.occasion.rng.child("validation", self.drawn)
        index = torch.randperm(n, generator=rng.torch())[:ROWS].to(held.y.device)
        return held.x[index], held.y[index]
