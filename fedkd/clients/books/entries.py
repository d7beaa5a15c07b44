"""The book of a layer: how long each example's gradient is, and the sum of gradients by weight.

Both follow from what the layer was given, a, and the signal that came back to it, g. Gradients of
single examples are formed only where they are small, or where nothing cheaper is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn import functional

from fedkd.clients.books.calls import Call

Sums = dict[Tensor, Tensor]
KEPT = 1 << 24
"""The most numbers that gradients of single examples of one layer may take up."""


class Scratch:
    """Memory that is used again in every batch: fresh pages cost more than what is done in them."""

    def __init__(self) -> None:
        self._held: dict[object, Tensor] = {}

    def take(self, name: object, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return numbers of any value, shaped and typed as asked; they are those of ``name``."""
        size, held = math.prod(shape), self._held.get(name)
        if (
            held is None
            or len(held) < size
            or held.dtype != like.dtype
            or held.device != like.device
        ):
            held = self._held[name] = like.new_empty(size)
        return held[:size].view(*shape)


class Entry(Protocol):
    """One layer's share in the gradients of a batch."""

    def lengths(self) -> list[Tensor]:
        """Return the L2 norm (B,) of each example's gradient, by trained parameter."""

    def sums(self, factors: Tensor) -> Sums:
        """Return ``sum_i factors_i * gradient_i`` of each trained parameter."""


def length(rows: Tensor) -> Tensor:
    """Return the L2 norm (B,) of each row (B, ...)."""
    return torch.linalg.vector_norm(rows if rows.dim() == 2 else rows.flatten(1), dim=1)


def joint(lengths: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm (B,) of what has these norms, part by part."""
    return torch.linalg.vector_norm(torch.stack(tuple(lengths)), dim=0)


def by_products(a: Tensor, g: Tensor) -> Tensor:
    """Return the norm (B,) of ``sum_t g_t a_t^T`` for a (B, T, d) and g (B, T, k).

    ``sum_st (a_s . a_t)(g_s . g_t)`` subtracts large numbers from one another, so it is taken in
    double precision, and rounded up by what it may have lost there.
    """
    x, y = a.double(), g.double()
    ours, theirs = torch.bmm(x, x.transpose(1, 2)), torch.bmm(y, y.transpose(1, 2))
    longest = [m.diagonal(dim1=1, dim2=2).sqrt() for m in (ours, theirs)]
    most = (longest[0] * longest[1]).sum(1).square()
    squared = (ours * theirs).sum((1, 2)).clamp_min(0)
    return (squared + a.shape[1] * torch.finfo(x.dtype).eps * most).sqrt().to(a.dtype)


def trained(p: Tensor | None) -> bool:
    """Return whether there is such a parameter and it learns."""
    return p is not None and p.requires_grad


class Formed:
    """Gradients of single examples, (B, ...) for each parameter, as they are."""

    def __init__(self, samples: dict[Tensor, Tensor]) -> None:
        self.samples = samples

    def lengths(self) -> list[Tensor]:
        return [length(sample) for sample in self.samples.values()]

    def sums(self, factors: Tensor) -> Sums:
        return {p: (factors @ s.flatten(1)).view_as(p) for p, s in self.samples.items()}


class Rows:
    """A linear layer on one vector an example: the gradient ``g a^T`` has the norm ``|g| |a|``."""

    def __init__(self, layer: nn.Linear, a: Tensor, g: Tensor) -> None:
        self.a, self.g = a, g
        weight, bias = layer.weight, layer.bias
        self.weight = weight if weight.requires_grad else None
        self.bias = bias if bias is not None and bias.requires_grad else None

    def lengths(self) -> list[Tensor]:
        return list(products([self]))

    def sums(self, factors: Tensor) -> Sums:
        found: Sums = {}
        if self.weight is not None:
            found[self.weight] = torch.mm((self.g * factors.unsqueeze(1)).t(), self.a)
        if self.bias is not None:
            found[self.bias] = torch.mv(self.g.t(), factors)
        return found


def products(rows: Sequence[Rows]) -> Tensor:
    """Return ``|g| |a|`` and ``|g|`` of every linear layer, (N, B): lengths by trained parameter.

    Rounded up by what squares can lose: numbers below the root of the smallest float have squares
    of zero, and a norm without them would let the product of a tiny and a huge row go unclipped.
    """
    sides = [one.a for one in rows] + [one.g for one in rows]
    norms = torch.stack([length(side) for side in sides])
    norms.add_((torch.finfo(norms.dtype).tiny * max(side.shape[1] for side in sides)) ** 0.5)
    norms[: len(rows)].mul_(norms[len(rows) :])
    shares = [one.weight is not None for one in rows] + [one.bias is not None for one in rows]
    return norms if all(shares) else norms[[i for i, asked in enumerate(shares) if asked]]


def norms_of(book: Sequence[Entry]) -> Tensor:
    """Return the L2 norm (B,) of each example's gradient over all layers."""
    rows = [entry for entry in book if isinstance(entry, Rows)]
    found = [part for entry in book if not isinstance(entry, Rows) for part in entry.lengths()]
    if not rows:
        return joint(found)
    lengths = products(rows)
    if found:
        lengths = torch.cat([lengths, torch.stack(found)])
    return torch.linalg.vector_norm(lengths, dim=0)


class Places:
    """A linear layer on T vectors an example, (B, T, d): ``sum_t g_t a_t^T``.

    Gradients are formed, unless they are much larger than the products of places, see
    :func:`by_products`.
    """

    def __init__(self, layer: nn.Linear, a: Tensor, g: Tensor, scratch: Scratch) -> None:
        self.layer, self.a, self.g = layer, a, g
        self.bias = g.sum(1) if trained(layer.bias) else None
        self.weight: Tensor | None = None
        (batch, places, wide), high = a.shape, g.shape[2]
        self.products = 4 * places * (wide + high) < wide * high
        if trained(layer.weight) and not self.products and batch * wide * high <= KEPT:
            kept = scratch.take(layer, (batch, high, wide), a)
            self.weight = torch.bmm(g.transpose(1, 2), a, out=kept)

    def lengths(self) -> list[Tensor]:
        found = [] if self.bias is None else [length(self.bias)]
        if self.weight is not None:
            found.append(length(self.weight))
        elif trained(self.layer.weight):
            found.append(by_products(self.a, self.g) if self.products else self._formed())
        return found

    def sums(self, factors: Tensor) -> Sums:
        found: Sums = {}
        weight = self.layer.weight
        if self.weight is not None:
            found[weight] = (factors @ self.weight.flatten(1)).view_as(weight)
        elif trained(weight):
            scaled = self.g * factors[:, None, None]
            found[weight] = scaled.flatten(0, 1).t() @ self.a.flatten(0, 1)
        if self.bias is not None:
            found[self.layer.bias] = factors @ self.bias
        return found

    def _formed(self) -> Tensor:
        pairs = zip(self.a, self.g, strict=True)
        return torch.cat([length((g.t() @ a)[None]) for a, g in pairs])


class Looked:
    """An embedding: each token's vector has the sum of the signals at its places."""

    def __init__(self, layer: nn.Embedding, tokens: Tensor, g: Tensor) -> None:
        self.layer, self.tokens = layer, tokens
        self.g = g
        if layer.padding_idx is not None:
            self.g = g.masked_fill((tokens == layer.padding_idx).unsqueeze(-1), 0.0)

    def lengths(self) -> list[Tensor]:
        batch = len(self.tokens)
        owner = torch.arange(batch, device=self.tokens.device)[:, None] * len(self.layer.weight)
        pairs, place = torch.unique(owner + self.tokens, return_inverse=True)
        vectors = self.g.new_zeros(len(pairs), self.g.shape[2])
        vectors.index_add_(0, place.flatten(), self.g.flatten(0, 1))
        squares = self.g.new_zeros(batch)
        squares.index_add_(0, pairs // len(self.layer.weight), length(vectors).square())
        return [squares.sqrt()]

    def sums(self, factors: Tensor) -> Sums:
        scaled = (self.g * factors[:, None, None]).flatten(0, 1)
        weight = self.layer.weight
        total = scaled.new_zeros(weight.shape)
        return {weight: total.index_add_(0, self.tokens.flatten(), scaled)}


def linear(layer: nn.Linear, calls: Sequence[Call], scratch: Scratch) -> Entry:
    """Return the entry of a linear layer: rows of several calls are places of one."""
    kind = layer.weight.dtype
    if len(calls) == 1 and calls[0].given.dim() == 2:
        return Rows(layer, calls[0].given.to(kind), calls[0].back.to(kind))
    a = torch.cat([_places(c.given.to(kind)) for c in calls], dim=1)
    g = torch.cat([_places(c.back.to(kind)) for c in calls], dim=1)
    return Places(layer, a, g, scratch)


def embedding(layer: nn.Embedding, calls: Sequence[Call], scratch: Scratch) -> Entry:
    """Return the entry of an embedding."""
    tokens = torch.cat([c.given.long().reshape(len(c.given), -1) for c in calls], dim=1)
    size = len(tokens), -1, layer.embedding_dim
    g = torch.cat([c.back.to(layer.weight.dtype).reshape(size) for c in calls], dim=1)
    return Looked(layer, tokens, g)


def layer_norm(layer: nn.LayerNorm, calls: Sequence[Call], scratch: Scratch) -> Entry:
    """Return the entry of a layer norm: ``sum_t g_t * normal(a_t)`` and ``sum_t g_t``."""
    shape = layer.normalized_shape
    return _scaled(layer, calls, lambda a: functional.layer_norm(a, shape, eps=layer.eps))


def group_norm(layer: nn.GroupNorm, calls: Sequence[Call], scratch: Scratch) -> Entry:
    """Return the entry of a group norm: as a layer norm's, over the places of each channel."""
    groups = layer.num_groups

    def normal(a: Tensor) -> Tensor:
        return functional.group_norm(a, groups, eps=layer.eps).movedim(1, -1)

    moved = [Call(c.given, c.back.movedim(1, -1)) for c in calls]
    return _scaled(layer, moved, normal)


def anything(layer: nn.Module, calls: Sequence[Call], scratch: Scratch) -> Entry:
    """Return the entry of any layer: its function is differentiated example by example."""
    held = {n: p for n, p in layer.named_parameters(recurse=False) if p.requires_grad}
    detached = {n: p.detach() for n, p in held.items()}

    def one(a: Tensor, g: Tensor) -> dict[str, Tensor]:
        def called(parameters: dict[str, Tensor]) -> Tensor:
            answer: Tensor = functional_call(layer, parameters, (a[None],))
            return answer[0]

        back: dict[str, Tensor] = vjp(called, detached)[1](g)[0]
        return back

    found = [vmap(one, randomness="different")(c.given, c.back) for c in calls]
    return Formed({p: total([f[n] for f in found]) for n, p in held.items()})


def _scaled(
    layer: nn.LayerNorm | nn.GroupNorm, calls: Sequence[Call], normal: Callable[[Tensor], Tensor]
) -> Entry:
    """Return the entry of what multiplies normalized numbers, and adds to them."""
    kind, shape = layer.weight.dtype, (-1, *layer.weight.shape)
    samples: dict[Tensor, Tensor] = {}
    back = [c.back.to(kind) for c in calls]
    if trained(layer.weight):
        products = [g * normal(c.given.to(kind)) for g, c in zip(back, calls, strict=True)]
        samples[layer.weight] = total([_at_places(p, shape) for p in products])
    if trained(layer.bias):
        samples[layer.bias] = total([_at_places(g, shape) for g in back])
    return Formed(samples)


def _at_places(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum (B, places ..., *shape) over places."""
    return values.reshape(len(values), *shape).sum(1)


def _places(values: Tensor) -> Tensor:
    """Return (B, ..., d) as (B, T, d)."""
    return values.reshape(len(values), -1, values.shape[-1])


def total(summands: Sequence[Tensor]) -> Tensor:
    """Return the sum of one tensor or more."""
    return summands[0] if len(summands) == 1 else torch.stack(tuple(summands)).sum(0)
