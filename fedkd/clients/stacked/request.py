"""Which fits can be done as one, and doing so: what an executor that gathers clients asks for.

A fit that no route can stack is done alone, by the one loop: that is never an error.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from operator import itemgetter

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
EXACT = frozenset((bool, int, str))
PLAIN = (bool, int, float, str, tuple)
OTHER = frozenset((type(None), dict, OrderedDict, set, list))


def reason(request: Request) -> str:
    """Return why ``request`` is trained alone; nothing: it can be stacked with its equals."""
    shape = Shape(request.model)
    return _reason(request, shape, _fused(request, shape))


def _reason(request: Request, shape: Shape, fused: bool) -> str:
    if not len(request.data) or not request.terms:
        return "there is nothing to learn from"
    if type(request.training) is not Training:
        return f"{type(request.training).__name__} may choose an optimizer of its own"
    for term in request.terms:
        if term.dp == "batch-coupled":
            return f"the term {term.name!r} compares the examples of a batch"
        if not _merges(type(term)):
            return f"the term {term.name!r} ({type(term).__name__}) is of one client only"
    frozen = request.training.frozen
    if (frozen and not set(frozen) <= set(request.model.names)) or not any(shape.trained(frozen)):
        return "there is nothing to train, or a block to freeze that is not there"
    return "" if fused else general.reason(request)


def key(request: Request) -> Hashable | None:
    """Return what requests that can be stacked have in common; None: train it alone.

    Equal networks and terms, but not their weights and targets, and equal options. Under DP-SGD
    the streams of noise may differ, and in the fused route how much of it there is.
    """
    shape = Shape(request.model)
    fused = _fused(request, shape)
    if _reason(request, shape, fused):
        return None
    x, y, dp = request.data.like, request.data.y, request.dp
    if dp is not None:
        dp = replace(dp, address="", noise_multiplier=0.0 if fused else dp.noise_multiplier)
    return (
        fused,
        shape.found,
        shape.trained(request.training.frozen),
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
    if first.data.like.device.type != "cpu":
        return True
    vectors = all(p.dim() <= 2 for p in first.model.parameters()) and first.data.y.dim() == 1
    return vectors and first.dp is None and len(requests) >= MANY


class Shape:
    """What networks have in common that differ in weights alone.

    ``found`` says of each module its name, type and plain options, and of each parameter its form.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[int, int] = {}
        self._trains: list[tuple[str, bool]] = []
        self.found: Hashable = tuple(self._walk(model, ""))

    def trained(self, frozen: Collection[str]) -> tuple[bool, ...]:
        """Return for each parameter of the network whether it is trained."""
        if not frozen:
            return tuple([trains for _, trains in self._trains])
        return tuple([trains and block_of(name) not in frozen for name, trains in self._trains])

    def _walk(self, module: nn.Module, prefix: str) -> list[Hashable]:
        """Return the parts of a module; what is used twice is told as the place that it has."""
        own: list[Hashable] = []
        for name, p in module._parameters.items():
            if p is None or id(p) in self._places:
                own.append((name, None if p is None else self._places[id(p)]))
                continue
            self._places[id(p)] = len(self._places)
            self._trains.append((prefix + name, p.requires_grad))
            own.append((name, p.shape, p.dtype, p.device))
        parts: list[Hashable] = [(prefix, _kind(module), tuple(own))]
        for name, child in module._modules.items():
            if child is None or id(child) in self._places:
                parts.append((prefix + name, None if child is None else self._places[id(child)]))
                continue
            self._places[id(child)] = len(self._places)
            parts += self._walk(child, f"{prefix}{name}.")
        return parts


@dataclass(frozen=True)
class _Case:
    """A request of which only ``spec`` counts; it is handed over once, so that none is kept."""

    spec: Hashable
    requests: list[Request] = field(compare=False)


def _fused(request: Request, shape: Shape) -> bool:
    """Return whether the fused route can train ``request``: found out once for its like."""
    modules = any(term.modules() for term in request.terms)
    if modules or request.dp is not None:
        return not linear.reason(request)
    like = request.data.like
    at = frozenset[str]().union(*[term.at() for term in request.terms])
    spec = (shape.found, request.training.precision, at, like.dim(), like.dtype)
    return _known(_Case(spec, [request]))


@lru_cache(maxsize=64)
def _known(case: _Case) -> bool:
    return not linear.reason(case.requests.pop())


@lru_cache(maxsize=256)
def _merges(kind: type[Term]) -> bool:
    """Return whether terms of a kind, many clients' as one, are more than a term of one client."""
    return next(above for above in kind.__mro__ if "merged" in vars(above)) is not Term


def _kind(thing: object) -> Hashable:
    """Return the type of something and its plain options."""
    # As text what compares equal and is not the same: -0.0, and 1 for True within a tuple.
    options: list[tuple[str, type, Hashable]] = []
    for name, value in vars(thing).items():
        kind = type(value)
        if kind in EXACT:
            if name != "training":
                options.append((name, kind, value))
        elif kind not in OTHER and isinstance(value, PLAIN):
            options.append((name, kind, repr(value)))
    options.sort(key=itemgetter(0))
    return type(thing), tuple(options)
