"""The loss terms that local training is put together from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedkd.clients.local import Batch, Term
from fedkd.data.federated import UNLABELLED
from fedkd.distill.objectives.base import Objective, Temperature, squared
from fedkd.distill.targets import Targets
from fedkd.models.base import BlockNet


def row_mean(values: Tensor, y: Tensor) -> Tensor:
    """Return the mean over the tokens of each row that have a label: (B, L) -> (B,); 0 for none."""
    real = y != UNLABELLED
    return torch.where(real, values, torch.zeros_like(values)).sum(1) / real.sum(1).clamp_min(1)


class Supervised(Term):
    """Cross-entropy with the true label, ``-log softmax(z)_y``, optionally label-smoothed.

    With smoothing s the target is ``(1 - s) onehot(y) + s / C``; s = 0 is plain cross-entropy. A
    row of text costs the mean over its tokens.
    """

    name = "supervised"

    def __init__(self, weight: float = 1.0, label_smoothing: float = 0.0) -> None:
        self.weight, self.label_smoothing = weight, label_smoothing

    def __call__(self, batch: Batch) -> Tensor:
        if batch.y.dim() == 1:
            return functional.cross_entropy(
                batch.logits, batch.y, reduction="none", label_smoothing=self.label_smoothing
            )
        values = functional.cross_entropy(
            batch.logits.flatten(0, 1),
            batch.y.flatten(),
            ignore_index=UNLABELLED,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return row_mean(values.view(batch.y.shape), batch.y)


class Proximal(Term):
    """``mu/2 * ||w - w0||^2`` over the named parameters (squared; its gradient is mu (w - w0)).

    Source: Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020, eq. 2.
    mu = 0 is FedAvg: leave the term out.
    """

    dp = "weights-only"
    name = "proximal"

    def __init__(self, model: BlockNet, reference: Mapping[str, Tensor], mu: float) -> None:
        self.weight = mu / 2
        named = dict(model.named_parameters())
        self._pairs = [(named[key], value) for key, value in reference.items() if key in named]

    def __call__(self, batch: Batch) -> Tensor:
        return torch.stack([(w - w0).square().sum() for w, w0 in self._pairs]).sum()


class HeadSupervised(Term):
    """Cross-entropy of a head that reads the features of one block beside the network."""

    name = "head"

    def __init__(self, head: nn.Module, block: str, weight: float) -> None:
        self.head, self.block, self.weight = head, block, weight

    def __call__(self, batch: Batch) -> Tensor:
        logits = self.head(batch.features[self.block])
        return functional.cross_entropy(logits, batch.y, reduction="none")

    def at(self) -> frozenset[str]:
        return frozenset({self.block})

    def modules(self) -> Sequence[nn.Module]:
        return (self.head,)


class Distil(Term):
    """An objective between the student's logits and a teacher's soft targets.

    The student is the network's own output, or the given head on the features of ``block``. An
    example without a target (an absent class) contributes nothing: its loss is masked, and not
    that against a target of zeros. Targets are constants: no gradient reaches a teacher.
    ``temperature`` is one number, or (n,) of one for each training example. Without ``rescale`` the
    loss lacks the factor T^2: an example counts the less, the hotter it is taught. ``counts`` (n,)
    multiplies the loss of each training example (none: 1), without making up for it elsewhere. Text
    is taught token by token, with targets (n, L, V) and temperatures and counts of (n, L).
    """

    name = "distil"

    def __init__(
        self,
        objective: Objective,
        targets: Targets,
        temperature: Temperature,
        weight: float,
        head: nn.Module | None = None,
        block: str = "",
        rescale: bool = True,
        counts: Tensor | None = None,
    ) -> None:
        self.objective, self.targets = objective, targets
        self.temperature, self.weight = temperature, weight
        self.head, self.block, self.rescale = head, block, rescale
        self.counts = counts

    def __call__(self, batch: Batch) -> Tensor:
        probs, mask = self.targets(batch.y, batch.index)
        logits = batch.logits if self.head is None else self.head(batch.features[self.block])
        given = self.temperature
        temperature = given[batch.index] if isinstance(given, Tensor) else given
        rows = logits.shape[:-1]
        if len(rows) == 2:
            logits, probs = logits.flatten(0, 1), probs.flatten(0, 1)
            temperature = temperature.flatten() if isinstance(temperature, Tensor) else temperature
        loss = self.objective(logits, probs, temperature)
        if not self.rescale:
            loss = loss / squared(temperature, loss)
        loss = loss.view(rows)
        if self.counts is not None:
            loss = loss * self.counts[batch.index]
        if len(rows) == 2:
            return row_mean(loss, batch.y)
        return torch.where(mask, loss, torch.zeros_like(loss))

    def at(self) -> frozenset[str]:
        return frozenset() if self.head is None else frozenset({self.block})

    def modules(self) -> Sequence[nn.Module]:
        return () if self.head is None else (self.head,)
