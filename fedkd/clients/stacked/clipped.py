"""DP-SGD on stacked weights: each example's gradient is clipped, under ``vmap`` twice.

The mechanism is that of :mod:`fedkd.clients.dp_sgd`, with the same coins and the same noise; only
how the gradients of single examples are found differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.clients.dp_sgd import UNCLIPPED, rate_of
from fedkd.clients.local import Batch, Term
from fedkd.clients.noise import Noise
from fedkd.clients.stacked.modules import Joined
from fedkd.clients.stacked.ragged import Step
from fedkd.clients.stacked.stack import Stack
from fedkd.clients.stacked.weights import Key, Weights

BYTES_AT_ONCE = 128 << 20
"""Gradients of single examples in memory at once; a client's batch is not divided for it."""


class Clipped:
    """The released gradients of a step: clip each example's to C, sum, add noise, divide by q n.

    Called with a step it returns gradients (K', ...) of the weights that train and each term's loss
    (K', J), summed over examples. An example whose gradient is not finite contributes nothing.
    Terms that read no data are added after the noise.
    """

    def __init__(self, stack: Stack, network: Joined, weights: Weights) -> None:
        dp = stack.first.dp
        assert dp is not None
        self.network, self.weights, self.terms = network, weights, stack.terms
        self.own = [term for term in stack.terms if term.dp == "per-example"]
        self.at = frozenset().union(*(term.at() for term in self.own))
        self.bound = min(dp.max_grad_norm, UNCLIPPED)
        std = dp.noise_multiplier * self.bound
        self.physical = dp.max_physical_batch_size
        self.noise = [
            Noise(r.rng.child("dp-noise", dp.address), std, dp.mode) for r in stack.requests
        ]
        self.expected = [rate_of(r.training, len(r.data)) * len(r.data) for r in stack.requests]

    def __call__(self, step: Step) -> tuple[list[Tensor | None], Tensor]:
        """Return the gradients and losses of a step."""
        sums, own = self._summed(step)
        for noise, *one in zip(self.noise, *sums, strict=False):
            noise.add(one)
        apart, values = self._apart(step)
        expected = torch.tensor(self.expected[: step.active], device=step.x.device)
        found: list[Tensor | None] = []
        for total, extra in zip(sums, apart, strict=True):
            released = total / _column(expected.to(total), total)
            found.append(released if extra is None else released + extra)
        by_term = dict(zip(self.own, own.unbind(1), strict=True))
        by_term |= {term: value * step.counts for term, value in values.items()}
        return found, torch.stack([by_term[term] for term in self.terms], 1)

    def _summed(self, step: Step) -> tuple[list[Tensor], Tensor]:
        """Return the sums of clipped gradients (K', ...) and of losses (K', J of own terms)."""
        leaves = [leaf.detach() for leaf in self.weights.narrow(step.active)]
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        losses = sums[0].new_zeros(step.active, len(self.own))
        if not self.own:
            return sums, losses
        keys = self.weights.trained
        live = {key: w[: step.active] for key, w in self.weights.full.items()}
        held = {key: w for key, w in live.items() if key not in set(keys)}
        real = torch.ones_like(step.index, dtype=torch.bool) if step.real is None else step.real
        width = self.physical or real.shape[1]
        size = sum(leaf[0].numel() * leaf.element_size() for leaf in leaves) * width
        many = torch.vmap(self._client, chunk_size=max(1, BYTES_AT_ONCE // size))
        for part in zip(
            *(v.split(width, 1) for v in (step.x, step.y, step.index, real)), strict=True
        ):
            found, values = many(dict(zip(keys, leaves, strict=True)), held, *part)
            sums = [total + found[key] for total, key in zip(sums, keys, strict=True)]
            losses = losses + values
        return sums, losses

    def _client(
        self,
        trained: dict[Key, Tensor],
        held: dict[Key, Tensor],
        x: Tensor,
        y: Tensor,
        index: Tensor,
        real: Tensor,
    ) -> tuple[dict[Key, Tensor], Tensor]:
        """Return one client's sum of clipped gradients, and of its examples' losses (J,)."""
        each = torch.vmap(torch.func.grad(self._loss, has_aux=True), (None, None, 0, 0, 0))
        found, values = each(trained, held, x, y, index)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in found.values()]).norm(dim=0)
        kept = real & norms.isfinite() & values.isfinite().all(1)
        factors = torch.where(kept, (self.bound / (norms + 1e-6)).clamp(max=1.0), 0.0)
        sums = {
            key: torch.tensordot(factors, torch.where(_column(kept, g), g, 0.0), 1)
            for key, g in found.items()
        }
        return sums, torch.where(kept[:, None], values, 0.0).sum(0)

    def _loss(
        self,
        trained: dict[Key, Tensor],
        held: dict[Key, Tensor],
        x: Tensor,
        y: Tensor,
        index: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return one example's loss, and what each own term adds to it, without its weight (J,)."""
        self.weights.bind(trained | held, None)
        logits, features = self.network.forward_with_features(x[None], self.at)
        batch = Batch(x[None], y[None], index[None], logits, features)
        values = torch.stack([term(batch)[0] for term in self.own])
        weighted = [term.weight * value for term, value in zip(self.own, values, strict=True)]
        return torch.stack(weighted).sum(), values.detach()

    def _apart(self, step: Step) -> tuple[list[Tensor | None], dict[Term, Tensor]]:
        """Return the gradients and values (K',) of the terms that read no data."""
        leaves = self.weights.narrow(step.active)
        terms = [term for term in self.terms if term.dp == "weights-only"]
        if not terms:
            return [None] * len(leaves), {}
        nobody = step.x[0, :0]
        weights = self.weights.of_network()
        batch = Batch(nobody, step.y[0, :0], step.index[0, :0], nobody, {}, weights)
        values = {term: term(batch) for term in terms}
        total = torch.stack([term.weight * value.sum() for term, value in values.items()]).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
        return list(found), {term: value.detach() for term, value in values.items()}


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))
