"""The fused route: networks of linear layers, many clients' steps as a few batched products."""

from __future__ import annotations

import torch
from torch import Tensor

from fedkd.clients.dp_sgd import dp_problems
from fedkd.clients.local import FitResult
from fedkd.clients.stacked.applying import Direct, Explicit
from fedkd.clients.stacked.chain import Chain, obstacle
from fedkd.clients.stacked.private import Private
from fedkd.clients.stacked.ragged import Plan, Step
from fedkd.clients.stacked.signals import Signal, signal_of
from fedkd.clients.stacked.stack import Request, Stack, in_training


def reason(request: Request) -> str:
    """Return why this route cannot train ``request``; nothing: it can."""
    if request.training.precision != "float32":
        return f"clients.training.precision = {request.training.precision!r} is not fused"
    for term in request.terms:
        if term.modules():
            return f"the term {term.name!r} trains a module beside the network"
    if not request.data.x.is_floating_point():
        return "the inputs are no numbers"
    at = frozenset[str]().union(*(term.at() for term in request.terms))
    found = obstacle(request.model, request.data.x.dim(), at)
    if not found and request.dp is not None:
        found = next(iter(dp_problems(request.model)), "")
    return found


def train(stack: Stack) -> list[FitResult | Exception]:
    """Train all networks of ``stack`` in place; return the results in its order."""
    first, plan = stack.first, stack.plan
    with in_training(stack.requests), torch.no_grad():
        at = frozenset[str]().union(*(term.at() for term in stack.terms))
        chain = Chain([request.model for request in stack.requests], at)
        signal = signal_of(stack.terms, plan, chain)
        apply: Direct | Explicit | Private
        if first.dp is not None:
            apply = Private(stack, chain)
        elif Direct.serves(first.training):
            apply = Direct(chain, first.training, first.lr)
        else:
            apply = Explicit(chain, first.training, first.lr)
        tally = Tally(len(stack.terms))
        for step in plan:
            found = signal(step, *chain.forward(step.x))
            tally.add(step, found, apply(step, found))
        finite = chain.finite().cpu()
        chain.write()
    return stack.results(tally.sums(plan), finite)


class Tally:
    """Each client's losses over the rows that count, put together at the end: steps may be small.

    One number a client, step and term is kept until then.
    """

    def __init__(self, terms: int) -> None:
        self.losses: list[list[Tensor]] = [[] for _ in range(terms)]

    def add(self, step: Step, signal: Signal, kept: Tensor | None) -> None:
        """Note a step; ``kept`` (K, B) are the rows that count, None: all."""
        for values, losses in zip(signal.values, self.losses, strict=True):
            if values.dim() == 1:
                losses.append(values * step.counts)
            else:
                losses.append((values if kept is None else torch.where(kept, values, 0)).sum(1))

    def sums(self, plan: Plan) -> Tensor:
        """Return the sums (K, J), on the CPU."""
        found = torch.stack([torch.cat(losses) for losses in self.losses], 1).double().cpu()
        zeros = torch.zeros(len(plan.data), len(self.losses), dtype=found.dtype)
        return zeros.index_add_(0, plan.lanes, found)
