"""What is trained as one: fits of equal shape, the plan of their batches, their merged terms.

Both routes, the fused one for linear layers and the general one, take a stack and give its results,
so that only the arithmetic in between differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import Tensor

from fedkd.clients.dp_sgd import DpSgd
from fedkd.clients.local import FitResult, Term, finished, fit
from fedkd.clients.stacked.ragged import Plan, epochs, poisson
from fedkd.clients.terms import OnWeights
from fedkd.clients.training import Training, frozen
from fedkd.data.federated import Split
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng


@dataclass(eq=False)
class Request:
    """The arguments of one call of :func:`~fedkd.clients.local.fit`."""

    model: BlockNet
    data: Split
    terms: Sequence[Term]
    training: Training
    lr: float
    rng: Rng
    dp: DpSgd | None = None


@dataclass(frozen=True)
class Stack:
    """Requests that train together, in the order of ``plan``: most steps first.

    ``terms`` are the merged ones, over the union of the clients' examples in this order.
    """

    requests: list[Request]
    plan: Plan
    terms: list[Term]

    @property
    def first(self) -> Request:
        """One of them all, for what they have in common."""
        return self.requests[0]

    def results(self, sums: Tensor, finite: Tensor) -> list[FitResult | Exception]:
        """Return each client's result.

        Args:
            sums: (K, J), each term's loss summed over the client's examples and steps.
            finite: (K,), whether the client's weights are.
        """
        found: list[FitResult | Exception] = []
        rows = zip(self.requests, self.plan.steps, self.plan.examples, strict=True)
        for k, (request, steps, examples) in enumerate(rows):
            try:
                found.append(
                    finished(
                        request.terms,
                        request.training,
                        request.lr,
                        len(request.data),
                        request.dp,
                        steps,
                        examples,
                        sums[k].tolist(),
                        bool(finite[k]),
                    )
                )
            except RunError as error:
                found.append(error)
        return found


def stack(requests: Sequence[Request]) -> Stack | None:
    """Put requests of equal key together; None: their terms cannot be merged."""
    data, rngs = [r.data for r in requests], [r.rng for r in requests]
    draw = epochs if requests[0].dp is None else poisson
    plan = draw(data, requests[0].training, rngs)
    ordered = [requests[i] for i in plan.order]
    terms = []
    for column in zip(*(r.terms for r in ordered), strict=True):
        term = type(column[0]).merged(column, plan.data)
        if term is None:
            return None
        if isinstance(term, OnWeights) and not term.of([r.model for r in ordered]):
            return None
        terms.append(term)
    return Stack(ordered, plan, terms)


def alone(requests: Sequence[Request]) -> list[FitResult | Exception]:
    """Train one after the other."""
    found: list[FitResult | Exception] = []
    for r in requests:
        try:
            found.append(fit(r.model, r.data, r.terms, r.training, r.lr, r.rng, r.dp))
        except Exception as error:
            found.append(error)
    return found


@contextmanager
def in_training(requests: Sequence[Request]) -> Iterator[None]:
    """Hold all networks' frozen blocks, as one fit does, and leave the networks in training."""
    with ExitStack() as during:
        for request in requests:
            during.enter_context(frozen(request.model, request.training.frozen))
            request.model.train()
        yield
