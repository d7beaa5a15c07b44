"""Many clients' fits as one, for any network of blocks: ``torch.func`` over stacked weights.

The forward pass is the clients' own network under ``vmap``, the backward pass autograd's. That
saves launches and Python, not arithmetic, so on a CPU it pays for small steps alone: see
:func:`train` for what it was measured at, and the fused route for what linear layers can have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fedkd.clients.dp_sgd import dp_problems
from fedkd.clients.local import Batch, FitResult
from fedkd.clients.stacked.clipped import Clipped
from fedkd.clients.stacked.modules import Joined
from fedkd.clients.stacked.ragged import Step
from fedkd.clients.stacked.stack import Request, Stack, alone, in_training
from fedkd.clients.stacked.updates import Update
from fedkd.clients.stacked.weights import Weights
from fedkd.clients.teacher_terms import FromPeer
from fedkd.clients.terms import OnWeights
from fedkd.models.lstm import Lstm

Gradient = Callable[[Step], tuple[list[Tensor | None], Tensor]]
"""What a step leads to: gradients (K', ...) of the weights, summed losses (K', J)."""


def reason(request: Request) -> str:
    """Return why this route cannot train ``request`` in a stack; nothing: it can.

    Of terms nothing is said here. A network that ``vmap`` does not know how to run is found out
    only by :func:`train`, which then trains one client after the other.
    """
    if request.training.precision != "float32":
        return f"clients.training.precision = {request.training.precision!r} is not stacked"
    for part in _parts(request):
        for name, layer in part.named_modules():
            kind = f"the layer {name or 'itself'!r} ({type(layer).__name__})"
            if any(True for _ in layer.buffers(recurse=False)):
                return f"{kind} has a buffer, and only weights are stacked"
            if isinstance(layer, Lstm):
                return f"{kind} goes back through time by hand, for one network"
            if isinstance(layer, _DropoutNd):
                return f"{kind} draws numbers that a stack would draw otherwise"
            if isinstance(layer, _BatchNorm):
                return f"{kind} mixes the examples of a batch, padding included"
    return ""


def train(stack: Stack, bucketed: bool | None = None) -> list[FitResult | Exception]:
    """Train all clients of ``stack`` in place, each as ``fit`` would; return what was done.

    With ``bucketed`` the number of clients in a step is rounded up to a power of two, so that a GPU
    sees few shapes; None: on everything but CPUs. There one would also capture a step of each shape
    as a CUDA graph. It runs on any device, but was not tested on GPUs.

    On one CPU thread it took, for one fit after the other to take 1: 0.4 with 50 MLPs of 3,000
    parameters, 0.6 with 50 and 1.2 with 10 of 50,000, 1.3 with 10 small transformers, and 2 with 10
    convolutional networks, which ``vmap`` turns into grouped ones; under DP-SGD 2 to 3.

    Where the stack turns out to be none (a network that ``vmap`` cannot run, weights that clients
    share), clients are trained one after the other.
    """
    network = Joined([request.model for request in stack.requests])
    beside = [module for term in stack.terms for module in term.modules()]
    joined = [module for module in beside if isinstance(module, Joined)]
    if len(joined) < len(beside) or _unlike(stack, joined):
        return alone(stack.requests)
    with in_training(stack.requests):
        for part in joined:
            for member in part.members:
                member.train()
        weights = Weights([network, *joined])
        if not (weights.trained and weights.apart() and _runs(stack, network, weights)):
            return alone(stack.requests)
        update = Update(weights.trainable(), stack.first.training, stack.first.lr)
        device = stack.first.data.like.device
        rounded = device.type != "cpu" if bucketed is None else bucketed
        shape = (len(stack.requests), len(stack.terms))
        sums = torch.zeros(shape, dtype=torch.float64, device=device)
        gradient: Gradient = partial(_gradient, stack, network, weights)
        if stack.first.dp is not None:
            gradient = Clipped(stack, network, weights)
        for step in stack.plan:
            full = padded(step, len(stack.requests)) if rounded else step
            gradients, losses = gradient(full)
            sums[: step.active] += losses[: step.active]
            update([None if g is None else g[: step.active] for g in gradients])
        return stack.results(sums.cpu(), weights.hand_back())


def padded(step: Step, clients: int) -> Step:
    """Return ``step`` with as many clients as the next power of two, at most ``clients``.

    Those beyond ``step.active`` are done: they have rows, none of which is real.
    """
    room = min(clients, 1 << (step.active - 1).bit_length())
    if room == step.active:
        return step

    def filled(values: Tensor) -> Tensor:
        return torch.cat([values, values[:1].expand(room - step.active, *values.shape[1:])])

    real = torch.ones_like(step.index, dtype=torch.bool) if step.real is None else step.real
    nobody = torch.arange(room, device=real.device) >= step.active
    return replace(
        step,
        active=room,
        x=filled(step.x),
        y=filled(step.y),
        index=filled(step.index),
        counts=filled(step.counts).masked_fill(nobody, 0),
        real=filled(real).masked_fill(nobody[:, None], False),
    )


def _gradient(
    stack: Stack, network: Joined, weights: Weights, step: Step
) -> tuple[list[Tensor | None], Tensor]:
    """Return the gradient (K', ...) of each weight, and each term's summed loss (K', J)."""
    leaves = weights.narrow(step.active)
    rows = step.x.flatten(0, 1)
    at = frozenset().union(*(term.at() for term in stack.terms))
    logits, features = network.forward_with_features(rows, at) if at else (network(rows), {})
    y, index = step.y.flatten(0, 1), step.index.flatten(0, 1)
    batch = Batch(rows, y, index, logits, features, weights.of_network())
    losses = [
        term(batch) if term.dp == "weights-only" else step.mean(term(batch).view(step.index.shape))
        for term in stack.terms
    ]
    total = torch.stack(
        [term.weight * loss.sum() for term, loss in zip(stack.terms, losses, strict=True)]
    ).sum()
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    means = torch.stack([loss.detach() for loss in losses], 1)
    return list(found), means * step.counts[:, None]


def _unlike(stack: Stack, joined: list[Joined]) -> bool:
    """Return whether these requests are none that can be stacked, whoever put them together."""
    first = stack.first
    models = [request.model for request in stack.requests]
    taught = {id(module) for module in joined}
    return (
        len(models) < 2
        or bool(reason(first))
        or any(name not in first.model.names for name in first.training.frozen)
        or any(term.dp == "batch-coupled" for term in stack.terms)
        or any(isinstance(t, OnWeights) and not t.of(models) for t in stack.terms)
        or any(isinstance(t, FromPeer) and id(t.peer.net) not in taught for t in stack.terms)
        or (first.dp is not None and any(dp_problems(part) for part in _parts(first)))
    )


def _parts(request: Request) -> Iterator[nn.Module]:
    yield request.model
    for term in request.terms:
        yield from term.modules()


def _runs(stack: Stack, network: Joined, weights: Weights) -> bool:
    """Try two clients on two rows: ``vmap`` runs the network, and rows do not see each other."""
    rows = torch.cat([request.data.x[:1] for request in stack.requests[:2]])
    weights.narrow(2)
    try:
        found = network(torch.cat([rows, rows])).detach()
    except (RuntimeError, TypeError, ValueError):
        return False
    with torch.no_grad():
        own = stack.first.model(rows[:1])
    return torch.allclose(found[:1], own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))
