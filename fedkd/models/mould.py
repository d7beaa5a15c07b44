"""Networks from a prototype that was taken apart once: a copy costs its weights and little more.

A client gets a fresh network in every round, and ``copy.deepcopy`` walks it object by object, which
for a small one takes longer than several steps of training.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

ATOMS = (bool, int, float, complex, str, bytes, type, types.FunctionType, types.BuiltinFunctionType)
TORCH_ATOMS = (type(None), torch.dtype, torch.device)
CONTAINERS: tuple[Callable[..., Any], ...] = (dict, OrderedDict, list, set)


@dataclass(frozen=True)
class Place:
    """Where a parameter goes: its full name, and how it lies in memory."""

    key: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def filled(self, value: np.ndarray) -> nn.Parameter:
        """Return the parameter with these numbers.

        Raises:
            ValueError: ``value`` has another shape.
        """
        data = torch.empty_strided(self.shape, self.stride, dtype=self.dtype)
        fill(data, self.key, value)
        return nn.Parameter(data, self.requires_grad)


@dataclass(frozen=True)
class Part:
    """One module of the prototype: what copies share, what each gets anew, and what is below."""

    kind: type[nn.Module]
    shared: dict[str, Any]
    fresh: dict[str, Callable[[], Any]]
    parameters: dict[str, Place | None]
    children: dict[str, Part | None]

    def cast(self, values: Mapping[str, np.ndarray]) -> nn.Module:
        """Return a new module of this kind, with all below it."""
        made = self.kind.__new__(self.kind)
        own = vars(made)
        own.update(self.shared)
        for name, new in self.fresh.items():
            own[name] = new()
        own["_parameters"] = {
            name: None if place is None else place.filled(values[place.key])
            for name, place in self.parameters.items()
        }
        own["_modules"] = {
            name: None if child is None else child.cast(values)
            for name, child in self.children.items()
        }
        return made


class Mould:
    """Makes networks of a prototype's structure; thread-safe, as it never changes.

    What is beyond plain modules (hooks, buffers, a module used twice, attributes that are neither
    constants nor lists of them) is copied by ``copy.deepcopy`` as ever.
    """

    def __init__(self, prototype: nn.Module) -> None:
        self.prototype = prototype
        modules = list(prototype.modules())
        once = len(modules) == sum(1 for _ in prototype.named_modules(remove_duplicate=False))
        self._part = _taken(prototype, "") if once and all(map(_plain, modules)) else None

    def cast(self, values: Mapping[str, np.ndarray]) -> nn.Module:
        """Return a network of its own with the parameters ``values``, by full name.

        Raises:
            ValueError: an array has another shape than its parameter.
        """
        if self._part is not None:
            return self._part.cast(values)
        made = copy.deepcopy(self.prototype)
        for key, parameter in made.named_parameters():
            fill(parameter.detach(), key, values[key])
        return made


def fill(into: Tensor, key: str, value: np.ndarray) -> None:
    """Copy ``value`` into a tensor, whatever the memory format and device of either.

    Raises:
        ValueError: they have different shapes.
    """
    if value.shape != tuple(into.shape):
        raise ValueError(f"array {key!r} has shape {value.shape}, expected {tuple(into.shape)}")
    if into.is_cpu and into.dtype != torch.bfloat16:
        # NumPy asks nobody whether the source may be written to, and makes no copy between.
        np.copyto(into.numpy(), value)
    else:
        into.copy_(torch.tensor(value))


def _taken(module: nn.Module, prefix: str) -> Part:
    """Return the parts of a module whose attributes are all :func:`_plain`."""
    shared: dict[str, Any] = {}
    fresh: dict[str, Callable[[], Any]] = {}
    for name, value in vars(module).items():
        if _constant(value):
            shared[name] = value
        elif name not in ("_parameters", "_modules"):
            kind: Callable[..., Any] = type(value)
            fresh[name] = partial(kind, tuple(value)) if value else kind
    parameters = {
        name: None
        if p is None
        else Place(prefix + name, tuple(p.shape), p.stride(), p.dtype, p.requires_grad)
        for name, p in module._parameters.items()
    }
    children = {
        name: None if child is None else _taken(child, f"{prefix}{name}.")
        for name, child in module._modules.items()
    }
    return Part(type(module), shared, fresh, parameters, children)


def _plain(module: nn.Module) -> bool:
    """Say whether a module is no more than its attributes, and these can be made anew."""
    # What torch's own layers do when they are copied mends old files only.
    kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith("torch.nn.")]
    own = [vars(kind) for kind in kinds if kind is not object]
    return (
        not any(k.get("__slots__") or "__deepcopy__" in k or "__setstate__" in k for k in own)
        and all(p is None or (type(p) is nn.Parameter and not vars(p)) for p in _parameters(module))
        and all(
            _constant(value)
            or (type(value) in CONTAINERS and not value)
            or (type(value) in (list, set) and all(map(_constant, value)))
            for name, value in vars(module).items()
            if name not in ("_parameters", "_modules")
        )
    )


def _parameters(module: nn.Module) -> list[nn.Parameter | None]:
    return list(module._parameters.values())


def _constant(value: Any) -> bool:
    """Say whether two networks may hold one and the same object."""
    if isinstance(value, tuple):
        return all(map(_constant, value))
    return isinstance(value, ATOMS + TORCH_ATOMS)
