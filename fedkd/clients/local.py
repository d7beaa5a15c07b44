"""The one local training loop of the project: every strategy trains through :func:`fit`.

Data are preloaded tensors, permuted once an epoch by an addressed stream and sliced into batches,
so there is no loader to configure wrongly and no order that depends on workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedkd.clients.training import Training
from fedkd.data.federated import Split
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng

DpClass = Literal["per-example", "weights-only", "batch-coupled"]


@dataclass
class Batch:
    """One step's examples and what the network made of them.

    ``x`` (B, ...), ``y`` (B,), ``index`` (B,) positions in the split, ``logits`` (B, C),
    ``features`` the pooled outputs (B, d) of the blocks that some term asked for.
    """

    x: Tensor
    y: Tensor
    index: Tensor
    logits: Tensor
    features: dict[str, Tensor]


class Term(ABC):
    """One summand of the local loss: ``weight * mean over the batch`` of what it returns.

    ``dp`` says how it behaves under example-level DP: ``per-example`` terms return one value an
    example, (B,), and may be clipped one by one; ``weights-only`` terms return a scalar that does
    not depend on data; ``batch-coupled`` terms mix examples and are refused there.
    """

    dp: ClassVar[DpClass] = "per-example"
    name: ClassVar[str] = "term"
    weight: float

    @abstractmethod
    def __call__(self, batch: Batch) -> Tensor:
        """Return the loss of each example (B,), or a scalar for ``weights-only`` terms."""

    def at(self) -> frozenset[str]:
        """Return the blocks whose features this term reads."""
        return frozenset()

    def modules(self) -> Sequence[nn.Module]:
        """Return trainable modules of the term's own, such as heads beside the network."""
        return ()


@dataclass(frozen=True)
class FitResult:
    """What one call of :func:`fit` did: steps, examples seen, mean loss by name of the term.

    Terms of one name, such as the heads of several blocks, are averaged.
    """

    steps: int
    examples: int
    losses: dict[str, float] = field(default_factory=dict)


def fit(
    model: BlockNet,
    data: Split,
    terms: Sequence[Term],
    training: Training,
    lr: float,
    rng: Rng,
) -> FitResult:
    """Train ``model`` in place on ``sum_j weight_j * mean_B term_j`` and return what was done.

    Batches are consecutive slices of one permutation an epoch, the last may be smaller. With
    ``training.steps`` the epochs repeat until that many steps are done. Terms of weight 0 must be
    left out by the caller; they are not evaluated as zeros.

    Raises:
        RunError: the loss is not finite, with the advice that usually mends it.
    """
    if len(data) == 0 or not terms:
        return FitResult(0, 0)
    parts = [model, *(module for term in terms for module in term.modules())]
    # Two terms may share a head: each parameter is trained once.
    named = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    parameters = list(named.values())
    optimizer = training.make(parameters, lr)
    at = frozenset().union(*(term.at() for term in terms))
    sums = torch.zeros(len(terms))
    steps = examples = epoch = 0
    for part in parts:
        part.train()
    while True:
        for x, y, index in batches(data, training.batch_size, rng.child("epoch", epoch)):
            logits, features = model.forward_with_features(x, at) if at else (model(x), {})
            batch = Batch(x, y, index, logits, features)
            losses = [term(batch).mean() for term in terms]
            total = losses[0] * terms[0].weight
            for loss, term in zip(losses[1:], terms[1:], strict=True):
                total = total + loss * term.weight
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            if training.max_grad_norm:
                nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()
            sums += torch.stack([loss.detach() for loss in losses]).cpu() * len(y)
            steps, examples = steps + 1, examples + len(y)
            if steps == training.steps:
                break
        epoch += 1
        if steps == training.steps or (not training.steps and epoch == training.epochs):
            break
    # The loss of the last step says nothing about the weights that it left behind.
    finite = torch.stack([torch.isfinite(p).all() for p in parameters]).all()
    if not (finite and torch.isfinite(sums).all()):
        raise RunError(
            f"training diverged: loss or weights are not finite after {steps} steps; lower "
            f"clients.training.lr (now {lr:.4g}) or set clients.training.max_grad_norm = 2.0"
        )
    by_name: dict[str, list[float]] = {}
    for term, mean in zip(terms, (sums / examples).tolist(), strict=True):
        by_name.setdefault(term.name, []).append(mean)
    return FitResult(steps, examples, {k: sum(v) / len(v) for k, v in by_name.items()})


def batches(data: Split, size: int, rng: Rng) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return one epoch of ``data`` as (x, y, index) batches in the order of ``rng``."""
    order = torch.randperm(len(data), generator=rng.torch()).to(data.y.device)
    x = data.x.index_select(0, order)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    y = data.y.index_select(0, order)
    return list(zip(x.split(size), y.split(size), order.split(size), strict=True))
