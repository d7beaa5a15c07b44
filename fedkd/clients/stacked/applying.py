"""What becomes of a step's signals: weights that moved, with or without gradients in between."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.clients.stacked.chain import Chain, Trace
from fedkd.clients.stacked.ragged import Step
from fedkd.clients.stacked.signals import Signal
from fedkd.clients.stacked.updates import Update
from fedkd.clients.training import Training


class Direct:
    """Plain SGD: the product that would be a gradient is added to the weights right away.

    With momentum it is added to the momentum. A gradient as large as the weights is never written.
    """

    @staticmethod
    def serves(training: Training) -> bool:
        """Return whether these options need no gradient by itself."""
        return training.optimizer == "sgd" and not training.max_grad_norm

    def __init__(self, chain: Chain, training: Training, lr: float) -> None:
        self.chain, self.lr = chain, lr
        self.momentum, self.decay = training.momentum, training.weight_decay
        trained = chain.trained.items() if self.momentum else ()
        self.moments = {name: torch.zeros_like(p) for name, p in trained}
        self.active = 0
        self.own: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, step: Step, signal: Signal) -> Tensor | None:
        """Move the weights; return which rows counted (K, B), None for all."""
        scale = averaged(step, signal)
        traces = {
            name: trace
            for trace in self.chain.backward(signal.logits, signal.features)
            for name in trace.layer.trained
        }
        if self.active != step.active:
            self._narrow(step.active)
        for name, (own, target) in self.own.items():
            trace, apart = traces.get(name), signal.weights.get(name)
            if trace is None and apart is None:
                continue
            keep, rate = 1 - self.lr * self.decay, -self.lr
            if self.momentum:
                keep, rate = self.momentum, 1.0
            if trace is not None:
                add(trace, target, keep, rate * scale)
            elif keep != 1:
                target.mul_(keep)
            if apart is not None:
                target.add_(apart, alpha=rate)
            if self.momentum:
                if self.decay:
                    target.add_(own, alpha=self.decay)
                own.add_(target, alpha=-self.lr)
        return step.real

    def _narrow(self, active: int) -> None:
        """Go on with the first ``active`` clients: their weights, and what is added to."""
        self.active = active
        for name, weight in self.chain.trained.items():
            own = weight[:active]
            self.own[name] = own, self.moments[name][:active] if self.momentum else own


class Explicit:
    """Any optimizer and clipping, on gradients by name; also of terms that read no data."""

    def __init__(self, chain: Chain, training: Training, lr: float) -> None:
        self.chain = chain
        self.update = Update(list(chain.trained.values()), training, lr)
        self.room = {name: torch.empty_like(p) for name, p in chain.trained.items()}

    def __call__(self, step: Step, signal: Signal) -> Tensor | None:
        """Move the weights; return which rows counted (K, B), None for all."""
        scale = averaged(step, signal)
        traces = self.chain.backward(signal.logits, signal.features)
        self.move(self.gradients(traces, scale), signal)
        return step.real

    def gradients(self, traces: list[Trace], scale: float) -> dict[str, Tensor]:
        """Return ``scale`` times the gradients (K, ...), in memory that the next step uses."""
        found = {}
        for trace in traces:
            for name in trace.layer.trained:
                found[name] = self.room[name][: len(trace.signal)]
                add(trace, found[name], 0.0, scale)
        return found

    def move(self, gradients: dict[str, Tensor], signal: Signal) -> None:
        """Take a step with ``gradients`` and those of the terms that read no data."""
        for name, apart in signal.weights.items():
            if name in gradients:
                gradients[name].add_(apart)
            elif name in self.chain.trained:
                gradients[name] = apart
        self.update([gradients.get(name) for name in self.chain.trained])


def averaged(step: Step, signal: Signal) -> float:
    """Weigh the rows of ``signal`` in place; return the factor that is left to make means of them.

    Full batches need no pass over the signal: the factor is one for all of them.
    """
    if step.real is None:
        return 1 / step.index.shape[1]
    for one in (signal.logits, *signal.features.values()):
        if one is not None:
            one.mul_(step.shares.to(one.dtype)[:, None])
    return 1.0


def add(trace: Trace, target: Tensor, keep: float, scale: float) -> None:
    """Make ``target`` (K, ...) ``keep`` times itself and ``scale`` times the gradient of it."""
    if target.dim() == 3:
        target.baddbmm_(trace.signal, trace.inputs.transpose(1, 2), beta=keep, alpha=scale)
    else:
        # A product with ones is a sum, scaled and added in one call.
        target.unsqueeze(2).baddbmm_(trace.signal, trace.ones, beta=keep, alpha=scale)
