"""Cross-entropy alone, the usual case: what labels ask for is laid out for many steps at once.

A step is then two calls, and the losses are read from what many steps left behind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkd.clients.stacked.ragged import Plan, Step
from fedkd.clients.stacked.signals import Signal
from fedkd.clients.terms import Supervised

ROOM = 1 << 20
"""Numbers in one of the two tables, unless a single step has more: it bounds the memory."""


class Labels:
    """``weight (softmax(z) - target)`` (K, C, B), and what each row's loss is.

    ``target = (1 - s) onehot(y) + s / C`` with the smoothing s of the term. The gradient is that of
    ``-target . log_softmax(z)``, so the target goes in with its sign turned.

    Args:
        term: the only one.
        plan: all steps, of labels in 0..C-1.
        like: has the place and the type of the logits.
    """

    def __init__(self, term: Supervised, plan: Plan, classes: int, like: Tensor) -> None:
        self.weight, self.smoothing, self.plan = term.weight, term.label_smoothing, plan
        self.classes, self.like = classes, like
        self.y = plan.labels
        self.losses: list[Tensor] = []
        largest = plan.first[1] * classes * self.y.shape[1]
        self.many, self.begin, self.end = max(1, ROOM // largest), 0, 0
        self.rows, self.logs = slice(0, 0), torch.empty(0)
        self.views: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: Step, logits: Tensor, features: Mapping[str, Tensor]) -> Signal:
        if step.number == self.end:
            self._go_on()
        minus, logs = self.views[step.number - self.begin]
        width = logits.shape[2]
        if width < minus.shape[2]:
            minus, logs = minus[:, :, :width], logs[:, :, :width]
        torch.log_softmax(logits, 1, out=logs)
        kind = logits.dtype
        return Signal(torch.ops.aten._log_softmax_backward_data.default(minus, logs, 1, kind))

    def add(self, step: Step, signal: Signal, kept: Tensor | None) -> None:
        """Note nothing: what a step left is read when there are many."""

    def sums(self, plan: Plan) -> Tensor:
        """Return each client's summed losses (K, 1), on the CPU."""
        self._read()
        found = torch.cat(self.losses).double().cpu()
        zeros = torch.zeros(len(plan.data), dtype=found.dtype)
        return zeros.index_add_(0, plan.lanes, found)[:, None]

    def _go_on(self) -> None:
        """Lay out the next few steps."""
        self._read()
        first, self.begin = self.plan.first, self.end
        begin = self.begin
        self.end = min(begin + self.many, len(first) - 1)
        self.rows = slice(first[begin], first[self.end])
        y = self.y[self.rows]
        shape = (len(y), self.classes, y.shape[1])
        minus = self.like.new_full(shape, -self.weight * self.smoothing / self.classes)
        hit = minus.new_full((), -self.weight * (1 - self.smoothing))
        minus.scatter_add_(1, y[:, None], hit.expand(len(y), 1, y.shape[1]))
        self.logs = self.like.new_zeros(shape)
        cuts = [first[s + 1] - first[s] for s in range(begin, self.end)]
        self.views = list(zip(minus.split(cuts), self.logs.split(cuts), strict=True))

    def _read(self) -> None:
        """Sum the losses of the steps that were laid out."""
        if not self.views:
            return
        y = self.y[self.rows]
        values = self.logs.gather(1, y[:, None])[:, 0].mul_(self.smoothing - 1)
        if self.smoothing:
            values.sub_(self.logs.mean(1), alpha=self.smoothing)
        real = self.plan.real[self.rows].to(values.device)
        self.losses.append(torch.where(real, values, 0).sum(1))
        self.views = []
