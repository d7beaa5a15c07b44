"""Many clients' stacks of linear layers as one: forward, and what comes back to each layer.

Autograd would build a graph in every step and gradients as large as the weights; here a step is a
few batched products, and whoever uses them may put them where they belong. Vectors are columns,
(K, d, B): that way a layer's weights are multiplied as they lie, and classes are summed fastest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fedkd.models.base import BlockNet

Forward = Callable[[Tensor], Tensor]
Backward = Callable[[Tensor, Tensor], Tensor]
aten = torch.ops.aten

ACTIVATIONS: dict[type[nn.Module], tuple[Forward, Forward, Backward]] = {
    nn.ReLU: (
        torch.relu,
        torch.relu_,
        lambda g, out: aten.threshold_backward.grad_input(g, out, 0, grad_input=g),
    ),
    nn.Tanh: (
        torch.tanh,
        torch.tanh_,
        lambda g, out: aten.tanh_backward.grad_input(g, out, grad_input=g),
    ),
    nn.Sigmoid: (
        torch.sigmoid,
        torch.sigmoid_,
        lambda g, out: aten.sigmoid_backward.grad_input(g, out, grad_input=g),
    ),
}
"""An activation, the same in place, and what makes the gradient behind it that before it, in place.

The last reads what the activation returned.
"""


@dataclass
class Trace:
    """What a layer's gradient is made of: ``signal`` (K, out, B) times ``inputs`` (K, in, B).

    For the bias the inputs are ``ones`` (K, B, 1).
    """

    layer: Layer
    inputs: Tensor
    signal: Tensor
    ones: Tensor


class Layer:
    """One linear layer of K clients: ``weight`` (K, out, in), ``bias`` (K, out) or None.

    ``names`` are those of the two in the network; ``trained`` those which train. What it returns
    lies in memory that the next step uses.
    """

    def __init__(self, block: str, modules: Sequence[nn.Linear], names: Mapping[int, str]) -> None:
        self.block, self.modules = block, modules
        first = modules[0]
        self.weight = torch.stack([m.weight.detach() for m in modules])
        self.bias: Tensor | None = None
        self.names = [names[id(first.weight)]]
        self.trained = {self.names[0]: self.weight} if first.weight.requires_grad else {}
        if first.bias is not None:
            self.bias = torch.stack([m.bias.detach() for m in modules])
            self.names.append(names[id(first.bias)])
            if first.bias.requires_grad:
                self.trained[self.names[1]] = self.bias
        self._views: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self._room: list[Tensor] = []
        self.prefix(len(modules), 1)

    def prefix(self, active: int, rows: int) -> None:
        """Look at ``rows`` of the first ``active`` clients only, until told otherwise."""
        if (active, rows) not in self._views:
            self._views[active, rows] = self._made(active, rows)
        self.own, self.back, self.out, self.below = self._views[active, rows]
        self.shift = None if self.bias is None else self.bias[:active]
        self.column = None if self.shift is None else self.shift.unsqueeze(2)

    def _made(self, active: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return views of the weights of some clients, and room for what they lead to."""
        own, sizes = self.weight[:active], self.weight.shape[1:]
        needed = [len(self.modules) * rows * size for size in sizes]
        if not self._room or len(self._room[0]) < needed[0]:
            self._room, self._views = [own.new_empty(n) for n in needed], {}
        out, below = (
            room[: active * rows * size].view(active, size, rows)
            for room, size in zip(self._room, sizes, strict=True)
        )
        return own, own.transpose(1, 2), out, below

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (K, in, B) to (K, out, B)."""
        if self.column is None:
            return torch.bmm(self.own, inputs, out=self.out)
        return torch.baddbmm(self.column, self.own, inputs, out=self.out)

    def backward(self, signal: Tensor) -> Tensor:
        """Map the gradient behind the layer (K, out, B) to that before it (K, in, B)."""
        return torch.bmm(self.back, signal, out=self.below)

    def write(self) -> None:
        """Copy what was trained back into the clients' modules."""
        for k, module in enumerate(self.modules):
            for name, own in zip(self.names, (module.weight, module.bias), strict=False):
                if name in self.trained:
                    own.copy_(self.trained[name][k])


class Activation:
    """What is done to each number by itself; ``inside``: where it lies."""

    def __init__(self, block: str, kind: type[nn.Module]) -> None:
        self.block = block
        self.forward, self.inside, self.backward = ACTIVATIONS[kind]


class Chain:
    """The networks of K clients; :func:`obstacle` finds nothing against any of them.

    Args:
        at: the blocks whose outputs somebody reads as features.
    """

    def __init__(self, models: Sequence[BlockNet], at: Collection[str] = ()) -> None:
        self.at = frozenset(at)
        self.parts: list[Layer | Activation] = []
        names = {id(p): name for name, p in models[0].named_parameters()}
        for column in zip(*(list(leaves(model)) for model in models), strict=True):
            block, module = column[0]
            linear = [m for _, m in column if isinstance(m, nn.Linear)]
            if linear:
                self.parts.append(Layer(block, linear, names))
            elif type(module) in ACTIVATIONS:
                self.parts.append(Activation(block, type(module)))
        self.layers = [part for part in self.parts if isinstance(part, Layer)]
        self.trained = {name: p for layer in self.layers for name, p in layer.trained.items()}
        self.lowest = next(
            i for i, part in enumerate(self.parts) if isinstance(part, Layer) and part.trained
        )
        # Behind which part a block's features are: its last one, or that of the block before it.
        self.behind: dict[int, list[str]] = {}
        last = -1
        for name in models[0].names:
            own = [i for i, part in enumerate(self.parts) if part.block == name]
            last = own[-1] if own else last
            if name in self.at:
                self.behind.setdefault(last, []).append(name)
        # What nobody reads any more is written over: linear outputs, and never the inputs.
        for i, (before, part) in enumerate(pairwise(self.parts)):
            if isinstance(before, Layer) and isinstance(part, Activation) and i not in self.behind:
                part.forward = part.inside
        self.shape = (0, 0)
        self.seen: list[Tensor] = []
        self._ones: dict[tuple[int, int], Tensor] = {}

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits (K, C, B) of x (K, B, ...), and features (K, d, B) by block."""
        hidden = x.flatten(2).transpose(1, 2)
        if self.shape != x.shape[:2]:
            active, rows = x.shape[:2]
            self.shape = (active, rows)
            for layer in self.layers:
                layer.prefix(active, rows)
            if self.shape not in self._ones:
                self._ones[self.shape] = hidden.new_ones(active, rows, 1)
            self.ones = self._ones[self.shape]
        self.seen = [hidden]
        for part in self.parts:
            hidden = part.forward(hidden)
            self.seen.append(hidden)
        features = {n: self.seen[i + 1] for i, names in self.behind.items() for n in names}
        return hidden, features

    def backward(self, signal: Tensor | None, features: Mapping[str, Tensor]) -> list[Trace]:
        """Return what reaches the layers that train, deepest first.

        Args:
            signal: the gradient with respect to the logits (K, C, B); None: no loss reads them.
            features: those with respect to features (K, d, B), of the blocks that a loss reads.
        """
        found = []
        for i in range(len(self.parts) - 1, self.lowest - 1, -1):
            part = self.parts[i]
            for name in self.behind.get(i, ()):
                if name in features:
                    signal = features[name] if signal is None else signal + features[name]
            if signal is None:
                continue
            if isinstance(part, Activation):
                signal = part.backward(signal, self.seen[i + 1])
                continue
            if part.trained:
                found.append(Trace(part, self.seen[i], signal, self.ones))
            if i > self.lowest:
                signal = part.backward(signal)
        return found

    def named(self) -> dict[str, Tensor]:
        """Return the weights of the clients at work (K, ...), trained or not, by name."""
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            for name, own in zip(layer.names, (layer.own, layer.shift), strict=False):
                if own is not None:
                    found[name] = own
        return found

    def finite(self) -> Tensor:
        """Return (K,): whether all that a client trained is finite."""
        # A finite sum has finite summands, and is found much sooner than by a look at each.
        every = list(self.trained.values())
        found = torch.stack([p.flatten(1).sum(1) for p in every]).isfinite().all(0)
        for k in (~found).nonzero().flatten().tolist():
            found[k] = all(bool(p[k].isfinite().all()) for p in every)
        return found

    def write(self) -> None:
        """Copy what was trained back into the networks."""
        for layer in self.layers:
            layer.write()


def leaves(model: BlockNet) -> Iterator[tuple[str, nn.Module]]:
    """Yield a network's innermost modules in the order of their use, each with its block."""

    def inside(module: nn.Module) -> Iterator[nn.Module]:
        if type(module) is nn.Sequential:
            for child in module:
                yield from inside(child)
        else:
            yield module

    for name in model.names:
        for leaf in inside(model.get_submodule(name)):
            yield name, leaf


def obstacle(model: BlockNet, dimensions: int, at: Collection[str] = ()) -> str:
    """Return why a network is no chain of linear layers; nothing: it is one.

    Args:
        dimensions: how many an input has, the batch among them.
        at: blocks whose features are asked for.
    """
    if type(model) is not BlockNet:
        return f"{type(model).__name__} may do more than its blocks, one after the other"
    seen: set[int] = set()
    for block, leaf in leaves(model):
        kind = type(leaf)
        if kind is nn.Flatten and (leaf.start_dim, leaf.end_dim) == (1, -1):
            dimensions = 2
        elif kind in ACTIVATIONS or kind is nn.Linear:
            if dimensions != 2:
                return f"{kind.__name__} of block {block!r} does not get vectors"
        elif kind is not nn.Identity:
            return f"{kind.__name__} of block {block!r} is neither a linear layer nor an activation"
        weights = {id(p) for p in leaf.parameters()}
        if weights & seen:
            return f"the weights of block {block!r} are used twice"
        seen |= weights
        if block in at and dimensions != 2:
            return f"the features of block {block!r} are no vectors"
    return ""
