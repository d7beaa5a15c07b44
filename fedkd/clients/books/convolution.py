"""The book of a convolution: windows of its input times the signal, example by example.

Windows are copied a few examples at a time, so that they are still in the cache when they are
multiplied. That costs little more than the ordinary gradient, which is then not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from fedkd.clients.books.calls import Call
from fedkd.clients.books.entries import (
    KEPT,
    Entry,
    Formed,
    Scratch,
    Sums,
    by_products,
    length,
    total,
    trained,
)

CACHED = 1 << 18
"""Numbers of windows that are made at once: one megabyte."""
WIDE = 4
"""From so many channels on a window holds runs of channels, and below it runs of places."""


class Windows:
    """What a convolution multiplies its kernels with: (B, T, K) of T places and K weights a kernel.

    ``K = channels x height x width`` of a kernel, in this order, or with channels last where there
    are several. Examples and groups are one dimension: the chunks are (b G, T, K).
    """

    def __init__(self, layer: nn.Conv2d, a: Tensor, places: tuple[int, int], scratch: Scratch):
        self.groups, self.places = layer.groups, places
        self.channels, self.kernel = a.shape[1] // layer.groups, _pair(layer.kernel_size)
        self.last = layer.groups == 1 and a.shape[1] >= WIDE
        self.size = self.channels * self.kernel[0] * self.kernel[1]
        self.scratch, self.stride, self.dilation = scratch, layer.stride, layer.dilation
        self.padded = self._pad(a, _pair(layer.padding))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield where on the first dimension, and windows of some examples; memory is reused."""
        examples = len(self.padded)
        at_once = max(1, CACHED // (self.groups * self.size * self.places[0] * self.places[1]))
        for start in range(0, examples, at_once):
            part = self.padded[start : start + at_once]
            view = self._view(part)
            held = self.scratch.take("windows", view.shape, part).copy_(view)
            rows, t = len(part) * self.groups, self.places[0] * self.places[1]
            first = start * self.groups
            if self.last:
                yield slice(first, first + rows), held.view(rows, t, self.size)
            else:
                yield slice(first, first + rows), held.view(rows, self.size, t).transpose(1, 2)

    def as_kernel(self, weights: Tensor) -> Tensor:
        """Return (..., O K), as the windows are ordered, as (..., O, C, h, w) on its memory."""
        first = weights.shape[:-1]
        if self.last:
            return weights.view(*first, -1, *self.kernel, self.channels).movedim(-1, -3)
        return weights.view(*first, -1, self.channels, *self.kernel)

    def _pad(self, a: Tensor, padding: tuple[int, int]) -> Tensor:
        batch, channels, height, width = a.shape
        high, wide = padding
        tall, broad = height + 2 * high, width + 2 * wide
        if self.last:
            held = self.scratch.take("padded", (batch, tall, broad, channels), a).movedim(3, 1)
        else:
            held = self.scratch.take("padded", (batch, channels, tall, broad), a)
        if high or wide:
            held.zero_()
        held[:, :, high : high + height, wide : wide + width].copy_(a)
        return held

    def _view(self, part: Tensor) -> Tensor:
        example, channel, row, column = part.stride()
        down, right = (s * n for s, n in zip(_pair(self.stride), (row, column), strict=True))
        high, wide = (d * n for d, n in zip(_pair(self.dilation), (row, column), strict=True))
        if self.last:
            shape = (len(part), *self.places, *self.kernel, self.channels)
            strides = (example, down, right, high, wide, channel)
        else:
            shape = (len(part), part.shape[1], *self.kernel, *self.places)
            strides = (example, channel, high, wide, down, right)
        return part.as_strided(shape, strides, part.storage_offset())


class Kernels:
    """The entry of a convolution that was called once.

    As for a linear layer, T places an example: gradients are formed, unless they are much larger
    than the products of places, or than what may be kept.
    """

    def __init__(self, layer: nn.Conv2d, a: Tensor, g: Tensor, scratch: Scratch, name: object):
        self.layer, self.a, self.g = layer, a, g
        self.signal = g.flatten(2)
        self.bias = self.signal.sum(2) if trained(layer.bias) else None
        self.formed: Tensor | None = None
        self.norm: Tensor | None = None
        if not trained(layer.weight):
            return
        self.windows = Windows(layer, a, (g.shape[2], g.shape[3]), scratch)
        batch, filters, places = self.signal.shape
        own, size = filters // layer.groups, self.windows.size
        signal = self.signal.reshape(batch * layer.groups, own, places)
        if 4 * places * (own + size) < own * size:
            self.norm = self._products(signal)
        elif batch * filters * size <= KEPT:
            formed = scratch.take(name, (len(signal), own, size), a)
            for at, window in self.windows.chunks():
                torch.bmm(signal[at], window, out=formed[at])
            self.formed = formed.view(batch, filters * size)
        else:
            self.norm = self._passing(signal)

    def lengths(self) -> list[Tensor]:
        found = [] if self.bias is None else [length(self.bias)]
        if self.formed is not None:
            found.append(length(self.formed))
        elif self.norm is not None:
            found.append(self.norm)
        return found

    def sums(self, factors: Tensor) -> Sums:
        found: Sums = {}
        layer = self.layer
        if self.formed is not None:
            found[layer.weight] = self.windows.as_kernel(factors @ self.formed)
        elif self.norm is not None:
            scaled = self.g * factors[:, None, None, None]
            found[layer.weight] = conv2d_weight(
                self.a,
                layer.weight.shape,
                scaled,
                layer.stride,
                _pair(layer.padding),
                layer.dilation,
                layer.groups,
            )
        if self.bias is not None and layer.bias is not None:
            found[layer.bias] = factors @ self.bias
        return found

    def _products(self, signal: Tensor) -> Tensor:
        found = [by_products(w, signal[at].transpose(1, 2)) for at, w in self.windows.chunks()]
        return self._of_examples(torch.cat(found))

    def _passing(self, signal: Tensor) -> Tensor:
        found = [length(torch.bmm(signal[at], window)) for at, window in self.windows.chunks()]
        return self._of_examples(torch.cat(found))

    def _of_examples(self, lengths: Tensor) -> Tensor:
        return torch.linalg.vector_norm(lengths.view(len(self.a), -1), dim=1)


def convolution(layer: nn.Conv2d, calls: Sequence[Call], scratch: Scratch) -> Entry:
    """Return the entry of a convolution; gradients of several calls are formed and added."""
    kind = layer.weight.dtype
    entries = [
        Kernels(layer, c.given.to(kind), c.back.to(kind), scratch, (layer, i))
        for i, c in enumerate(calls)
    ]
    if len(entries) == 1:
        return entries[0]
    samples: dict[Tensor, Tensor] = {}
    if trained(layer.weight):
        samples[layer.weight] = total([_sample(e) for e in entries])
    if layer.bias is not None and layer.bias.requires_grad:
        samples[layer.bias] = total([e.bias for e in entries if e.bias is not None])
    return Formed(samples)


def _sample(entry: Kernels) -> Tensor:
    """Return the gradients (B, O, C, h, w) of an entry, formed in any case."""
    if entry.formed is not None:
        return entry.windows.as_kernel(entry.formed)
    ones = torch.eye(len(entry.a), dtype=entry.a.dtype, device=entry.a.device)
    return torch.stack([entry.sums(one)[entry.layer.weight] for one in ones])


def _pair(value: int | str | tuple[int, ...]) -> tuple[int, int]:
    assert not isinstance(value, str)
    return (value, value) if isinstance(value, int) else (value[0], value[1])
