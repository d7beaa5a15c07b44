"""DP-SGD on a stack: every example of every client is clipped, and no gradient of one is formed.

The gradient of an example with respect to a linear layer is the product of its signal and its
inputs, so its norm is that of the factors; the clipped sum is one product with weighted rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.clients.dp_sgd import UNCLIPPED, rate_of
from fedkd.clients.noise import Noise
from fedkd.clients.stacked.applying import Explicit
from fedkd.clients.stacked.chain import Chain, Trace
from fedkd.clients.stacked.ragged import Step
from fedkd.clients.stacked.signals import Signal
from fedkd.clients.stacked.stack import Stack


class Private:
    """Clip to C, sum, add N(0, (z C)^2), divide by q n, update: a step of K clients.

    Noise is that of :func:`~fedkd.clients.dp_sgd.private`, client by client, from the same streams;
    z may differ between clients. An example whose gradient is not finite contributes nothing.
    """

    def __init__(self, stack: Stack, chain: Chain) -> None:
        self.chain = chain
        self.explicit = Explicit(chain, stack.first.training, stack.first.lr)
        sizes = [len(split) for split in stack.plan.data]
        expected = [rate_of(stack.first.training, n) * n for n in sizes]
        self.expected = next(iter(chain.trained.values())).new_tensor(expected)
        self.noises: list[Noise] = []
        self.norm = UNCLIPPED
        for request in stack.requests:
            if request.dp is not None:
                self.norm = min(request.dp.max_grad_norm, UNCLIPPED)
                rng = request.rng.child("dp-noise", request.dp.address)
                std = request.dp.noise_multiplier * self.norm
                self.noises.append(Noise(rng, std, request.dp.mode))
        self.noisy = any(noise.std for noise in self.noises)

    def __call__(self, step: Step, signal: Signal) -> Tensor:
        """Move the weights; return which rows counted (K, B)."""
        traces = self.chain.backward(signal.logits, signal.features)
        expected = self.expected[: step.active, None]
        factors, finite = self._factors(signal, traces)
        # Padding counts nothing, but its numbers go through the product like all others.
        whole = bool(finite.all())
        kept = finite if step.real is None else finite & step.real
        factors.masked_fill_(~kept, 0)
        if not self.noisy:
            factors /= expected
        for trace in traces:
            if not whole:
                # Nought times what is not finite is not nought.
                trace.signal = torch.where(finite[:, None], trace.signal, 0)
                trace.inputs = torch.where(finite[:, None], trace.inputs, 0)
            trace.signal.mul_(factors[:, None])
        found = self.explicit.gradients(traces, 1.0)
        # What no loss reaches has gradient zero, and gets its noise like all others.
        gradients = {
            name: found[name] if name in found else torch.zeros_like(weight[: step.active])
            for name, weight in self.chain.trained.items()
        }
        if self.noisy:
            for k, noise in enumerate(self.noises[: step.active]):
                noise.add([g[k] for g in gradients.values()])
            for g in gradients.values():
                g.div_(expected.view(-1, *[1] * (g.dim() - 1)))
        self.explicit.move(gradients, signal)
        return kept

    def _factors(self, signal: Signal, traces: list[Trace]) -> tuple[Tensor, Tensor]:
        """Return what each row's gradient is multiplied by, and which are finite at all (K, B)."""
        lengths = []
        for trace in traces:
            layer = trace.layer
            shares = [name in layer.trained for name in layer.names]
            back = _length(trace.signal)
            if shares[0]:
                lengths.append(_length(trace.inputs) * back)
            if any(shares[1:]):
                lengths.append(back)
        norms = torch.linalg.vector_norm(torch.stack(lengths), dim=0)
        finite = norms.isfinite()
        for values in signal.values:
            if values.dim() == 2:
                finite &= values.isfinite()
        return (self.norm / (norms + 1e-6)).clamp_max_(1.0), finite


def _length(values: Tensor) -> Tensor:
    """Return the norms (K, B) of columns (K, d, B), rounded up by what squares can lose.

    Numbers below the root of the smallest float have squares of zero: the product with a huge norm
    would go through unclipped.
    """
    least = (torch.finfo(values.dtype).tiny * values.shape[1]) ** 0.5
    if values.stride(1) == 1:
        return torch.linalg.vector_norm(values, dim=1).add_(least)
    return values.square().sum(1).sqrt_().add_(least)
