"""Which fits can be done as one, and doing so: what an executor that gathers clients asks for.

A fit that no route can stack is done alone, by the one loop: that is never an error.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from fedkd.clients.local import FitResult, Term
from fedkd.clients.stacked import general, linear
from fedkd.clients.stacked.stack import Request, alone, stack
from fedkd.clients.training import Training
from fedkd.models.base import block_of

__all__ = ["Request", "key", "reason", "stacked"]
log = logging.getLogger(__name__)

MANY = 16
"""Clients from which on the general route pays on a CPU."""


def reason(request: Request) -> str:
    """Return why ``request`` is trained alone; nothing: it can be stacked with its equals."""
    if not len(request.data) or not request.terms:
        return "there is nothing to learn from"
    if type(request.training) is not Training:
        return f"{type(request.training).__name__} may choose an optimizer of its own"
    for term in request.terms:
        if term.dp == "batch-coupled":
            return f"the term {term.name!r} compares the examples of a batch"
        if next(kind for kind in type(term).__mro__ if "merged" in vars(kind)) is Term:
            return f"the term {term.name!r} ({type(term).__name__}) is of one client only"
    if not set(request.training.frozen) <= set(request.model.names) or not any(_trained(request)):
        return "there is nothing to train, or a block to freeze that is not there"
    found = linear.reason(request)
    return found and general.reason(request)


def key(request: Request) -> Hashable | None:
    """Return what requests that can be stacked have in common; None: train it alone.

    Equal networks and terms, but not their weights and targets, and equal options. Under DP-SGD
    the streams of noise may differ, and in the fused route how much of it there is.
    """
    if reason(request):
        return None
    fused = not linear.reason(request)
    x, y, dp = request.data.x, request.data.y, request.dp
    if dp is not None:
        dp = replace(dp, address="", noise_multiplier=0.0 if fused else dp.noise_multiplier)
    return (
        fused,
        tuple(_structure(request.model)),
        tuple(_trained(request)),
        (x.shape[1:], x.dtype, x.device, y.shape[1:], y.dtype),
        request.training,
        request.lr,
        tuple(_kind(term) for term in request.terms),
        dp,
    )


def stacked(requests: Sequence[Request]) -> list[FitResult | Exception]:
    """Train the networks of requests of one :func:`key` in place, each as ``fit`` would.

    Returns results in the order given; a client that diverges gets its error, the others go on.
    """
    if any(map(reason, requests)):
        return alone(requests)
    route = general if linear.reason(requests[0]) else linear
    made = stack(requests) if route is linear or pays(requests) else None
    if made is None:
        return alone(requests)
    try:
        found = route.train(made)
    except Exception as error:
        # Nothing is written to a network before the end, and one client's error is not another's.
        log.warning("%d fits are done one by one, as one stack failed: %r", len(requests), error)
        found = alone(made.requests)
    by_place = dict(zip(made.plan.order, found, strict=True))
    return [by_place[i] for i in range(len(requests))]


def pays(requests: Sequence[Request]) -> bool:
    """Return whether the general route is faster than one client after the other.

    On a CPU it is where operations are small and clients many: about 0.6 of the time for 50
    perceptrons, 1.2 for ten, twice for ten CNNs, two to three times for per-example gradients (a
    few alternating fits on a busy machine). Elsewhere it is taken for granted, and untested.
    """
    first = requests[0]
    if first.data.x.device.type != "cpu":
        return True
    vectors = all(p.dim() <= 2 for p in first.model.parameters()) and first.data.y.dim() == 1
    return vectors and first.dp is None and len(requests) >= MANY


def _trained(request: Request) -> Iterator[bool]:
    """Yield for each parameter of the network whether it is trained."""
    for name, p in request.model.named_parameters():
        yield p.requires_grad and block_of(name) not in request.training.frozen


def _structure(model: nn.Module) -> Iterator[Hashable]:
    for name, module in model.named_modules():
        own = module.named_parameters(recurse=False)
        yield name, _kind(module), tuple((n, p.shape, p.dtype, p.device) for n, p in own)


def _kind(thing: object) -> Hashable:
    """Return the type of something and its plain options."""
    plain = (bool, int, float, str, tuple)
    options = sorted((k, repr(v)) for k, v in vars(thing).items() if isinstance(v, plain))
    return type(thing), tuple(option for option in options if option[0] != "training")
