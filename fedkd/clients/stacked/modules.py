"""Several clients' modules of one structure, called as one: networks, and heads or peers beside.

A merged term calls it as each client calls its own; whoever trains says with which weights.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedkd.clients.stacked.written_out import WrittenOut
from fedkd.errors import RunError
from fedkd.models.base import BlockNet


class Joined(nn.Module):
    """Modules of K clients: rows of all (K' B, ...) in, rows of all out, each by its own weights.

    Rows of the first K' clients follow one another, B each. Weights are not its own: they are bound
    before use, K' of each, or those of one client, whose rows are then taken as they come.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        # In a tuple they are no submodules: what trains is the stack, and not the members.
        self.members = tuple(members)
        named = [dict(member.named_parameters()) for member in self.members]
        self.shared = {name: tuple(own[name] for own in named) for name in named[0]}
        self._weights: dict[str, Tensor] = {}
        self._clients: int | None = None

    def bind(self, weights: Mapping[str, Tensor], clients: int | None) -> None:
        """Use ``weights`` (clients, ...) by name from now on; None: those of one client."""
        self._weights, self._clients = dict(weights), clients

    def forward(self, rows: Tensor) -> Tensor:
        """Return what each client's module makes of its rows."""
        return self._rows(self._call(self.members[0], self._weights, rows))

    def forward_with_features(
        self, x: Tensor, at: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits and pooled features, as each client's network does.

        Raises:
            RunError: the members are no networks of blocks.
        """
        first = self.members[0]
        if not isinstance(first, BlockNet):
            raise RunError(f"{type(first).__name__} has no blocks whose features could be read")
        weights = {f"net.{name}": w for name, w in self._weights.items()}
        logits, features = self._call(_Reading(first, at), weights, x)
        return self._rows(logits), {block: self._rows(h) for block, h in features.items()}

    def _call(self, module: nn.Module, weights: dict[str, Tensor], rows: Tensor) -> Any:
        if self._clients is None:
            with WrittenOut():
                return functional_call(module, weights, (rows,))

        def one(own: dict[str, Tensor], mine: Tensor) -> Any:
            return functional_call(module, own, (mine,))

        with WrittenOut():
            return torch.vmap(one)(weights, rows.unflatten(0, (self._clients, -1)))

    def _rows(self, found: Tensor) -> Tensor:
        return found if self._clients is None else found.flatten(0, 1)


class _Reading(nn.Module):
    """A network whose call returns features beside logits: ``functional_call`` knows no other."""

    def __init__(self, net: BlockNet, at: Collection[str]) -> None:
        super().__init__()
        self.net, self.at = net, at

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.net.forward_with_features(x, self.at)


def join(modules: Sequence[nn.Module]) -> Joined | None:
    """Return modules of several clients as one; None: they differ in structure."""
    return Joined(modules) if len({signature(m) for m in modules}) == 1 else None


def signature(module: nn.Module) -> Hashable:
    """Return what two modules must have in common to compute the same function of their weights.

    Types and plain attributes of all layers (the number of heads of an attention is in no shape),
    and name, shape, type, place and trainability of each parameter. What cannot be compared counts
    as different.
    """
    layers = tuple(
        (name, type(layer), tuple(_plain(layer))) for name, layer in module.named_modules()
    )
    parameters = tuple(
        (name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in module.named_parameters()
    )
    return layers, parameters


def _plain(layer: nn.Module) -> list[Hashable]:
    found: list[Hashable] = []
    for key, value in vars(layer).items():
        if key.startswith("_") or key == "training":
            continue
        try:
            hash(value)
            found.append((key, value))
        except TypeError:
            found.append((key, id(value)))
    return found
