"""DP-SGD by book-keeping: one forward pass and one backward pass that forms no gradient.

The norm of each example's gradient follows from what every layer was given and what came back to
it; a second look at the same numbers gives the sum of clipped gradients. Source: Bu et al.,
Differentially Private Optimization on Large Model at Small Cost, ICML 2023, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from fedkd.clients.books import entries
from fedkd.clients.books.calls import Call, Calls, lost, own
from fedkd.clients.books.convolution import convolution
from fedkd.clients.books.entries import Entry, Scratch, Sums, norms_of

Maker = Callable[..., Entry]

KINDS: Mapping[type[nn.Module], Maker] = {
    nn.Linear: entries.linear,
    nn.Conv2d: convolution,
    nn.Embedding: entries.embedding,
    nn.LayerNorm: entries.layer_norm,
    nn.GroupNorm: entries.group_norm,
}


class Books:
    """Clipped gradients of a batch, in the places where an optimizer looks for gradients.

    Made by :func:`opened`. A batch is ``clear()``, a forward pass, ``backward(losses)``; or
    ``nothing()`` for an empty one. Then ``p.grad`` is ``1/E sum_i min(1, C / |g_i|) g_i`` for every
    trained parameter, zero where no loss reaches it; ``|g_i|`` is the norm over all of them.
    """

    def __init__(self, root: nn.Module, calls: Calls, max_grad_norm: float, divisor: float) -> None:
        self.calls, self.divisor = calls, divisor
        # A number that torch divides by norms is two operations on them, and a tensor is one.
        self._most = torch.tensor(max_grad_norm / divisor, dtype=torch.float64)
        self.trained = [(name, p) for name, p in root.named_parameters() if p.requires_grad]
        self._makers = {layer: maker_of(layer) for layer in calls.layers}
        self._scratch, self._checked = Scratch(), False

    def clear(self) -> None:
        """Forget the last batch, also one that ended in an error."""
        self.calls.clear()
        for _, p in self.trained:
            p.grad = None

    def nothing(self) -> None:
        """Leave what a batch without examples has: sums of nobody's gradients."""
        self.calls.clear()
        for _, p in self.trained:
            p.grad = torch.zeros_like(p)

    def backward(self, losses: Tensor) -> Tensor | None:
        """Leave the sums of clipped gradients of ``losses`` (B,).

        Return who is finite (B,) if not all are: nothing may be used then; clear, and go again
        without the others.

        Raises:
            ConfigError: a layer is used in a way that book-keeping does not follow.
        """
        self.calls.check(len(losses))
        truth = None if self._checked else self._of_the_first(losses)
        calls = self.calls.back(losses)
        with torch.no_grad(), self.paused():
            book = self._entries(calls, self._scratch)
            if not book:
                self.nothing()
                return torch.isfinite(losses)
            norms = norms_of(book)
            # One look at a product in place of one at every number: only finite ones make a finite
            # product, and it may overflow where none does.
            if not math.isfinite(torch.dot(norms, losses.to(norms.dtype)).item()):
                finite = torch.isfinite(norms) & torch.isfinite(losses)
                if not finite.all():
                    return finite
            if truth is not None:
                self._check(calls, norms, truth)
            factors = torch.div(self._most, norms.add_(1e-6)).clamp_(max=1 / self.divisor)
            for (_, p), found in zip(self.trained, self._sums(book, factors), strict=True):
                p.grad = found
        self.calls.clear()
        return None

    def form(self) -> bool:
        """Return False: there is no slower way to fall back on."""
        return False

    def paused(self) -> AbstractContextManager[None]:
        """Run networks on something that is not the batch's examples."""
        return self.calls.paused()

    def _entries(self, calls: Mapping[nn.Module, list[Call]], scratch: Scratch) -> list[Entry]:
        return [self._makers[layer](layer, each, scratch) for layer, each in calls.items()]

    def _sums(self, book: Sequence[Entry], factors: Tensor) -> list[Tensor]:
        """Return the weighted sum of gradients of every trained parameter."""
        sums: Sums = {}
        for entry in book:
            sums.update(entry.sums(factors))
        found = [(p, sums.get(p)) for _, p in self.trained]
        return [torch.zeros_like(p) if total is None else total for p, total in found]

    def _of_the_first(self, losses: Tensor) -> list[Tensor]:
        """Return the gradient of the first example as autograd finds it, by parameter."""
        parameters = [p for _, p in self.trained]
        if not losses.requires_grad:
            return [torch.zeros_like(p) for p in parameters]
        found = torch.autograd.grad(losses[0], parameters, retain_graph=True, allow_unused=True)
        pairs = zip(found, parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g for g, p in pairs]

    def _check(
        self, calls: Mapping[nn.Module, list[Call]], norms: Tensor, truth: Sequence[Tensor]
    ) -> None:
        """Compare the first example with autograd, once a fit: its gradient, and its norm."""
        first = {
            layer: [Call(c.given[:1], c.back[:1]) for c in each] for layer, each in calls.items()
        }
        alone = self._sums(self._entries(first, Scratch()), torch.ones_like(norms[:1]))
        expected = torch.stack([g.norm() for g in truth]).norm()
        apart = torch.stack(torch._foreach_norm(torch._foreach_sub(alone, list(truth))))
        for (name, _), near in zip(self.trained, (apart <= 0.01 * expected).tolist(), strict=True):
            if not near:
                raise lost(f"the parameter {name!r}")
        # Norms are rounded up on purpose: what must not be is one that is too small.
        if not norms[0] >= 0.99 * expected:
            raise lost("the network")
        self._checked = True


@contextmanager
def opened(
    parts: Sequence[nn.Module], max_grad_norm: float, divisor: float = 1.0
) -> Iterator[Books]:
    """Keep books of the trained layers of ``parts``; leave no trace, come what may."""
    root = nn.ModuleList(parts)
    calls = Calls([layer for layer in root.modules() if own(layer)])
    books = Books(root, calls, max_grad_norm, divisor)
    try:
        with calls.followed():
            yield books
    finally:
        for p in root.parameters():
            p.grad = None


def maker_of(layer: nn.Module) -> Maker:
    """Return what makes the entry of a layer: by formula where there is one for its options."""
    if isinstance(layer, nn.Conv2d) and (
        isinstance(layer.padding, str) or layer.padding_mode != "zeros"
    ):
        return entries.anything
    return KINDS.get(type(layer), entries.anything)


def unfollowed(root: nn.Module) -> list[str]:
    """Return the layers that book-keeping cannot follow, by name and type.

    Layers of Opacus, such as its DPLSTM, are called with places before examples; embeddings may
    mix the examples of a batch, change their weights, or have gradients that are no tensors.
    """
    return [
        f"{name or 'itself'!r} ({type(layer).__name__})"
        for name, layer in root.named_modules()
        if own(layer) and _foreign(layer)
    ]


def _foreign(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Embedding):
        return layer.scale_grad_by_freq or layer.sparse or layer.max_norm is not None
    opacus = type(layer).__module__.split(".")[0] == "opacus"
    return opacus or isinstance(layer, nn.EmbeddingBag)
