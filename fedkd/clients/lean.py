"""The optimizer's update and nothing beside it: torch's own optimizers cost a small step again.

They keep gradients on parameters, look for hooks and profilers, and group tensors anew in every
step. Here are the same operations on the same numbers in the same order, so that weights are equal
bit for bit (tests/oracle/test_lean_oracle.py); whatever is not exactly that stays with torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from fedkd.clients.training import Training

Gradients = Sequence[Tensor | None]
"""One for each trained parameter, None where the loss does not reach it; never written to."""


class Update(Protocol):
    """Moves the parameters that it was made for by one step; keeps what it remembers of them."""

    def __call__(self, gradients: Gradients) -> None:
        """Take the step; a parameter without gradient stays, and so does what is known of it."""


def update_for(training: Training, parameters: Sequence[nn.Parameter], lr: float) -> Update:
    """Return the update of ``training``'s optimizer, from a state that is fresh.

    A kind of training of its own may go on with an optimizer of its own, and keeps it.
    """
    if type(training) is not Training:
        return Wrapped(training.make(parameters, lr), parameters)
    if training.optimizer == "adam":
        return Adam(parameters, lr, training.weight_decay)
    return Sgd(parameters, lr, training.momentum, training.weight_decay)


def clipped(gradients: Gradients, bound: float) -> Gradients:
    """Return gradients times ``min(1, bound / (norm + 1e-6))``, the joint L2 norm of all.

    As ``torch.nn.utils.clip_grad_norm_``, but what is given stays: two parameters may have one and
    the same tensor for their gradients.
    """
    found = [g for g in gradients if g is not None]
    if not found:
        return gradients
    factor = (bound / (nn.utils.get_total_norm(found) + 1e-6)).clamp(max=1.0)
    scaled = iter(torch._foreach_mul(found, factor))
    return [None if g is None else next(scaled) for g in gradients]


class Sgd:
    """``torch.optim.SGD``: ``v <- m v + (g + d w)``, ``w <- w - lr v``; v starts as its summand."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        # Detached they are the same memory, and writing to them needs no look at the graph.
        self.weights = [p.detach() for p in parameters]
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self._moving: list[Tensor | None] = [None] * len(self.weights)

    def __call__(self, gradients: Gradients) -> None:
        """Take the step."""
        places = [i for i, g in enumerate(gradients) if g is not None]
        if not places:
            return
        found = [g for g in gradients if g is not None]
        weights = self.weights
        if len(places) < len(weights):
            weights = [weights[i] for i in places]
        if self.weight_decay:
            found = list(torch._foreach_add(found, weights, alpha=self.weight_decay))
        if self.momentum:
            found = self._move(places, found)
        torch._foreach_add_(weights, found, alpha=-self.lr)

    def _move(self, places: list[int], found: list[Tensor]) -> list[Tensor]:
        """Return the moving sums after this step, at the places that have a gradient."""
        known = [v for i in places if (v := self._moving[i]) is not None]
        if len(known) == len(places):
            torch._foreach_mul_(known, self.momentum)
            torch._foreach_add_(known, found, alpha=1.0)
            return known
        moved = []
        for i, g in zip(places, found, strict=True):
            v = self._moving[i]
            v = g.clone() if v is None else v.mul_(self.momentum).add_(g)
            self._moving[i] = v
            moved.append(v)
        return moved


class Adam:
    """``torch.optim.Adam`` with its own beta (0.9, 0.999) and epsilon 1e-8.

    ``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, ``w <- w - lr m' / (sqrt(v') + e)``
    with ``m' = m / (1 - b1^t)``, ``v' = v / (1 - b2^t)``, and g taken with ``weight_decay w``.
    Source: Kingma and Ba, ICLR 2015, algorithm 1.
    """

    beta1, beta2, epsilon = 0.9, 0.999, 1e-8

    def __init__(
        self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float = 0.0
    ) -> None:
        self.weights = [p.detach() for p in parameters]
        self.lr, self.weight_decay = lr, weight_decay
        self._steps = [0] * len(self.weights)
        self._mean = [torch.zeros_like(w) for w in self.weights]
        self._square = [torch.zeros_like(w) for w in self.weights]

    def __call__(self, gradients: Gradients) -> None:
        """Take the step: together for all parameters that had equally many gradients before."""
        by_step: dict[int, list[int]] = {}
        for i, g in enumerate(gradients):
            if g is not None:
                self._steps[i] += 1
                by_step.setdefault(self._steps[i], []).append(i)
        for step, places in by_step.items():
            self._together(step, places, [g for i in places if (g := gradients[i]) is not None])

    def _together(self, step: int, places: list[int], found: list[Tensor]) -> None:
        weights = [self.weights[i] for i in places]
        mean, square = [self._mean[i] for i in places], [self._square[i] for i in places]
        if self.weight_decay:
            found = list(torch._foreach_add(found, weights, alpha=self.weight_decay))
        torch._foreach_lerp_(mean, found, 1 - self.beta1)
        torch._foreach_mul_(square, self.beta2)
        torch._foreach_addcmul_(square, found, found, 1 - self.beta2)
        size = self.lr / (1 - self.beta1**step)
        below = torch._foreach_sqrt(square)
        torch._foreach_div_(below, (1 - self.beta2**step) ** 0.5)
        torch._foreach_add_(below, self.epsilon)
        torch._foreach_addcdiv_(weights, mean, below, -size)


class Wrapped:
    """Any optimizer of torch; parameters of it that are not trained now have no gradient."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        self.optimizer, self.parameters = optimizer, parameters

    def __call__(self, gradients: Gradients) -> None:
        """Take the step."""
        self.optimizer.zero_grad(set_to_none=True)
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        self.optimizer.step()
