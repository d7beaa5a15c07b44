"""What book-keeping remembers of a batch: inputs of each trained layer, and signals sent back.

One light forward hook a layer notes its input and the place of its output in autograd's graph. One
backward pass then asks for the gradients at those places alone, so no gradient of a parameter is
formed, and nothing is left on modules or parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fedkd.errors import ConfigError


class Call(NamedTuple):
    """One call of a layer: what it was given (B, ...), and what came back at its output."""

    given: Tensor
    back: Tensor


@dataclass
class _Noted:
    layer: nn.Module
    given: Tensor
    version: int
    edge: GradientEdge


@dataclass
class Calls:
    """The calls of one batch, layer by layer.

    A place in the graph stays that of the layer's output also where the output is changed in place
    later; an input that is changed later is refused.
    """

    layers: Sequence[nn.Module]
    _noted: list[_Noted] = field(default_factory=list)
    _paused: bool = False

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Note every call of the layers for a while."""
        handles = [layer.register_forward_hook(self._note) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._noted.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing for a while."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def clear(self) -> None:
        """Forget the last batch."""
        self._noted.clear()

    def check(self, examples: int) -> None:
        """Look at what was noted.

        Raises:
            ConfigError: a layer's rows are not the batch's examples, or its input was changed.
        """
        for one in self._noted:
            if one.given.shape[0] != examples:
                raise lost(f"a layer {type(one.layer).__name__}")
            if one.given._version != one.version:
                raise ConfigError(
                    f"DP-SGD: the input of a layer {type(one.layer).__name__} is changed in place "
                    "after the call; use an operation that returns a new tensor"
                )

    def back(self, losses: Tensor) -> dict[nn.Module, list[Call]]:
        """Return the calls of each layer that ``losses`` (B,) depend on, in the order of calls.

        Raises:
            ConfigError: a parameter is used whose layer was not called.
        """
        noted = self._noted
        called = {one.layer for one in noted}
        idle = (
            [] if len(called) == len(self.layers) else [x for x in self.layers if x not in called]
        )
        others = [p for layer in idle for p in own(layer)]
        if not losses.requires_grad or not (noted or others):
            return {}
        edges: list[Any] = [one.edge for one in noted]
        found = torch.autograd.grad(
            losses, [*edges, *others], torch.ones_like(losses), allow_unused=True
        )
        if others and any(gradient is not None for gradient in found[len(noted) :]):
            raise lost("a parameter that is used without a call of its layer")
        calls: dict[nn.Module, list[Call]] = {}
        for one, signal in zip(noted, found[: len(noted)], strict=True):
            if signal is not None:
                calls.setdefault(one.layer, []).append(Call(one.given, signal))
        return calls

    def _note(self, layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        if self._paused or not isinstance(output, Tensor) or not output.requires_grad:
            return
        if len(given) != 1 or not isinstance(given[0], Tensor) or not given[0].dim():
            raise lost(f"a layer {type(layer).__name__}")
        x = given[0].detach()
        self._noted.append(_Noted(layer, x, x._version, get_gradient_edge(output)))


def own(layer: nn.Module) -> list[nn.Parameter]:
    """Return the trained parameters that a layer has itself, and no layer inside it."""
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


def lost(what: str) -> ConfigError:
    """Return the error that says whose gradients cannot be told apart by example."""
    return ConfigError(
        f"DP-SGD: book-keeping does not follow {what}: what it takes for the gradient of one "
        "example is another, and clipping it would bound nothing. Either a loss of one example "
        "depends on others, or a layer is not called as a module on one tensor with one row for "
        "each example of the batch; if neither, set privacy.dp_sgd.grad_sample_mode = 'functorch'"
    )
