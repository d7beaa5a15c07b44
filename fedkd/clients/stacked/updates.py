"""What optimizers do to stacked weights: all of it is elementwise, so a stack is one large tensor.

Only two things are not torch's own loop: clients that are done leave the stack with their state,
and a bound on the gradient's norm is one for each client.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedkd.clients.training import Training

BETAS, EPS = (0.9, 0.999), 1e-8
"""The defaults of torch.optim.Adam."""


class Update:
    """The optimizer of :meth:`Training.make <fedkd.clients.training.Training.make>`, stacked.

    ``weights`` are those of all clients (K, ...), changed in place; state starts at zero.
    """

    def __init__(self, weights: Sequence[Tensor], training: Training, lr: float) -> None:
        self.weights, self.training, self.lr, self.steps = weights, training, lr, 0
        adam = training.optimizer == "adam"
        kept = 2 if adam else int(training.momentum > 0)
        self._state = [[torch.zeros_like(w) for _ in range(kept)] for w in weights]
        self._rule = self._adam if adam else self._sgd

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor | None]) -> None:
        """Take a step of the first K' clients, whose ``gradients`` (K', ...) are used up.

        Weights without a gradient (None) stay as they are.
        """
        self.steps += 1
        if self.training.max_grad_norm:
            gradients = clipped(gradients, self.training.max_grad_norm)
        decay = self.training.weight_decay
        for full, g, state in zip(self.weights, gradients, self._state, strict=True):
            if g is not None:
                w, own = full[: len(g)], [s[: len(g)] for s in state]
                self._rule(w, g.add(w, alpha=decay) if decay else g, own)

    def _sgd(self, w: Tensor, g: Tensor, state: list[Tensor]) -> None:
        if state:
            g = state[0].mul_(self.training.momentum).add_(g)
        w.add_(g, alpha=-self.lr)

    def _adam(self, w: Tensor, g: Tensor, state: list[Tensor]) -> None:
        mean, square = state
        mean.lerp_(g, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
        first, second = (1 - beta**self.steps for beta in BETAS)
        w.addcdiv_(mean, (square.sqrt() / second**0.5).add_(EPS), value=-self.lr / first)


def clipped(gradients: Sequence[Tensor | None], bound: float) -> list[Tensor | None]:
    """Return gradients with each client's joint one scaled to an L2 norm of at most ``bound``.

    As ``torch.nn.utils.clip_grad_norm_``: ``g * min(1, bound / (||g|| + 1e-6))``; not in place, as
    two of them may be one tensor.
    """
    norms = [g.flatten(1).norm(dim=1) for g in gradients if g is not None]
    factors = (bound / (torch.stack(norms).norm(dim=0) + 1e-6)).clamp(max=1.0)
    return [None if g is None else g * factors.view(-1, *[1] * (g.dim() - 1)) for g in gradients]
