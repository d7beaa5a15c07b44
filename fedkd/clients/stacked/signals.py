"""How the loss of a stack's step depends on what the networks return, row by row.

Cross-entropy alone, the usual case, is written out; everything else asks autograd, which then sees
logits and features only, and never the networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkd.clients.local import Batch, Term
from fedkd.clients.stacked.chain import Chain
from fedkd.clients.stacked.ragged import Plan, Step
from fedkd.clients.terms import Proximals, Supervised


@dataclass
class Signal:
    """Gradients of the losses of single rows, not yet averaged over a client's batch.

    ``logits`` (K, C, B) and ``features`` (K, d, B) by block, padding included; None or missing: no
    loss depends on them. ``weights`` (K, ...) by name are those of terms that read no data.
    ``values`` (K, B) by number of the term, or (K,) of the latter.
    """

    logits: Tensor | None
    features: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    values: list[Tensor] = field(default_factory=list)


class CrossEntropy:
    """``softmax(z) - target``, times the weight of a :class:`Supervised` term, step by step."""

    def __init__(self, term: Supervised) -> None:
        self.weight, self.smoothing = term.weight, term.label_smoothing
        self.places = torch.zeros(0)

    def __call__(self, step: Step, logits: Tensor, features: Mapping[str, Tensor]) -> Signal:
        clients, classes, rows = logits.shape
        if self.places.shape != (clients, rows):
            # The place of class 0 of each row in what is below one vector.
            base = torch.arange(clients, device=logits.device) * (classes * rows)
            self.places = base[:, None] + torch.arange(rows, device=logits.device)
            self.minus = logits.new_full((clients * rows,), self.smoothing - 1)
        logs = torch.log_softmax(logits, 1)
        places = torch.add(self.places, step.y, alpha=rows).view(-1)
        values = logs.view(-1).index_select(0, places).view(clients, rows).neg_()
        if self.smoothing:
            rest = logs.sum(1).mul_(-self.smoothing / classes)
            values = values.mul_(1 - self.smoothing).add_(rest)
        # Sooner than the exponential of what was found above, by half.
        slope = torch.softmax(logits, 1)
        slope.view(-1).index_add_(0, places, self.minus)
        if self.smoothing:
            slope.sub_(self.smoothing / classes)
        if self.weight != 1:
            slope.mul_(self.weight)
        return Signal(slope, values=[values])


class Pull:
    """``2 weight (w - w0)``: what a proximal term adds, in memory that the next step uses."""

    def __init__(self, term: Proximals, chain: Chain) -> None:
        self.term, self.chain = term, chain
        own = chain.named()
        self.room = {name: torch.empty_like(own[name]) for name in term.references}

    def __call__(self, step: Step, logits: Tensor, features: Mapping[str, Tensor]) -> Signal:
        own = self.chain.named()
        squares = []
        found = {}
        for name, reference in self.term.references.items():
            apart = self.room[name][: step.active]
            torch.sub(own[name], reference[: step.active], out=apart)
            squares.append(torch.linalg.vector_norm(apart.flatten(1), dim=1).square_())
            found[name] = apart.mul_(2 * self.term.weight)
        return Signal(None, weights=found, values=[torch.stack(squares).sum(0)])


class Joint:
    """Any merged terms, on rows of all clients one after the other.

    The usual ones are written out; the rest asks autograd: of logits, features and the weights.
    """

    def __init__(self, terms: Sequence[Term], chain: Chain, labelled: bool) -> None:
        self.chain, self.terms = chain, list(terms)
        self.written: dict[int, CrossEntropy | Pull] = {}
        for j, term in enumerate(terms):
            if labelled and type(term) is Supervised:
                self.written[j] = CrossEntropy(term)
            elif type(term) is Proximals:
                self.written[j] = Pull(term, chain)
        self.others = [term for j, term in enumerate(terms) if j not in self.written]
        self.reads_weights = any(term.dp == "weights-only" for term in self.others)

    def __call__(self, step: Step, logits: Tensor, features: Mapping[str, Tensor]) -> Signal:
        total = self._asked(step, logits, features) if self.others else Signal(None)
        others = iter(total.values)
        total.values = []
        for j in range(len(self.terms)):
            if j not in self.written:
                total.values.append(next(others))
                continue
            own = self.written[j](step, logits, features)
            total.values += own.values
            if own.logits is not None:
                total.logits = own.logits if total.logits is None else own.logits + total.logits
            for name, g in own.weights.items():
                total.weights[name] = g + total.weights[name] if name in total.weights else g
        return total

    def _asked(self, step: Step, logits: Tensor, features: Mapping[str, Tensor]) -> Signal:
        wanted = {"": logits, **features}
        rows = {k: v.transpose(1, 2).flatten(0, 1).requires_grad_() for k, v in wanted.items()}
        own = self.chain.named() if self.reads_weights else {}
        weights = {name: w.detach().requires_grad_() for name, w in own.items()}
        with torch.enable_grad():
            batch = Batch(
                step.x.flatten(0, 1),
                step.y.flatten(0, 1),
                step.index.flatten(),
                rows[""],
                {name: rows[name] for name in features},
                weights or None,
            )
            values = [term(batch) for term in self.others]
            weighted = [term.weight * v.sum() for term, v in zip(self.others, values, strict=True)]
            total = torch.stack(weighted).sum()
        found = _gradients(total, [*rows.values(), *weights.values()])
        shape = step.index.shape
        columns = {
            name: g.unflatten(0, shape).transpose(1, 2)
            for name, g in zip(rows, found, strict=False)
            if g is not None
        }
        by_name = zip(weights, found[len(rows) :], strict=True)
        apart = [term.dp == "weights-only" for term in self.others]
        return Signal(
            columns.pop("", None),
            columns,
            {name: g for name, g in by_name if g is not None},
            [
                v.detach() if alone else v.detach().view(shape)
                for v, alone in zip(values, apart, strict=True)
            ],
        )


def _gradients(total: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not total.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(total, leaves, allow_unused=True)


def labelled(plan: Plan, classes: int) -> bool:
    """Return whether all labels are one of the classes for each example.

    Another one would be read as a class of another row; autograd refuses it as fit does.
    """
    if plan.data[0].y.dim() != 1:
        return False
    return all(int(d.y.min()) >= 0 and int(d.y.max()) < classes for d in plan.data)
