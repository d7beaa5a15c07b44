"""The fused route: networks of linear layers, many clients' steps as a few batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.clients.dp_sgd import dp_problems
from fedkd.clients.local import FitResult
from fedkd.clients.stacked.applying import Direct, Explicit
from fedkd.clients.stacked.chain import Chain, obstacle
from fedkd.clients.stacked.labels import Labels
from fedkd.clients.stacked.private import Private
from fedkd.clients.stacked.ragged import Plan, Step
from fedkd.clients.stacked.signals import CrossEntropy, Joint, Signal, labelled
from fedkd.clients.stacked.stack import Request, Stack, in_training
from fedkd.clients.terms import Supervised


def reason(request: Request) -> str:
    """Return why this route cannot train ``request``; nothing: it can."""
    if request.training.precision != "float32":
        return f"clients.training.precision = {request.training.precision!r} is not fused"
    for term in request.terms:
        if term.modules():
            return f"the term {term.name!r} trains a module beside the network"
    if not request.data.like.is_floating_point():
        return "the inputs are no numbers"
    at = frozenset[str]().union(*(term.at() for term in request.terms))
    found = obstacle(request.model, request.data.like.dim(), at)
    if not found and request.dp is not None:
        found = next(iter(dp_problems(request.model)), "")
    return found


def train(stack: Stack) -> list[FitResult | Exception]:
    """Train all networks of ``stack`` in place; return the results in its order."""
    first, plan = stack.first, stack.plan
    with in_training(stack.requests), torch.no_grad():
        at = frozenset[str]().union(*(term.at() for term in stack.terms))
        chain = Chain([request.model for request in stack.requests], at)
        signal = signal_of(stack, chain)
        apply: Direct | Explicit | Private
        if first.dp is not None:
            apply = Private(stack, chain)
        elif Direct.serves(first.training):
            apply = Direct(chain, first.training, first.lr)
        else:
            apply = Explicit(chain, first.training, first.lr)
        tally = signal if isinstance(signal, Labels) else Tally(len(stack.terms))
        for step in plan:
            found = signal(step, *chain.forward(step.x))
            tally.add(step, found, apply(step, found))
        finite = chain.finite().cpu()
        chain.write()
    return stack.results(tally.sums(plan), finite)


def signal_of(stack: Stack, chain: Chain) -> Labels | CrossEntropy | Joint:
    """Return the cheapest way to the gradients of the terms."""
    last, plan, only = chain.layers[-1].weight, stack.plan, stack.terms[0]
    written = labelled(plan, last.shape[1])
    if not written or len(stack.terms) > 1 or type(only) is not Supervised:
        return Joint(stack.terms, chain, written)
    # What is clipped asks for each row's loss in its step.
    if stack.first.dp is not None:
        return CrossEntropy(only)
    return Labels(only, plan, last.shape[1], last)


FEW = 64
"""Steps whose losses are summed together."""


class Tally:
    """Each client's losses over the rows that count, put together at the end: steps may be small.

    One number a client, step and term is kept until then, and those of a few steps' rows.
    """

    def __init__(self, terms: int) -> None:
        self.losses: list[list[Tensor]] = [[] for _ in range(terms)]
        self.rows: list[list[Tensor]] = [[] for _ in range(terms)]

    def add(self, step: Step, signal: Signal, kept: Tensor | None) -> None:
        """Note a step; ``kept`` (K, B) are the rows that count, None: all."""
        for j, values in enumerate(signal.values):
            rows = self.rows[j]
            if values.dim() == 1:
                self.losses[j].append(values * step.counts)
                continue
            if rows and (len(rows) == FEW or rows[0].shape[1] != values.shape[1]):
                self._sum(j)
            rows.append(values if kept is None else torch.where(kept, values, 0))

    def _sum(self, j: int) -> None:
        """Sum what several steps left, in one call."""
        if self.rows[j]:
            self.losses[j].append(torch.cat(self.rows[j]).sum(1))
            self.rows[j].clear()

    def sums(self, plan: Plan) -> Tensor:
        """Return the sums (K, J), on the CPU."""
        for j in range(len(self.losses)):
            self._sum(j)
        found = torch.stack([torch.cat(losses) for losses in self.losses], 1).double().cpu()
        zeros = torch.zeros(len(plan.data), len(self.losses), dtype=found.dtype)
        return zeros.index_add_(0, plan.lanes, found)
