"""The architectures of one federation and their initial weights, the same on every side.

Initial weights come from an addressed stream, so the server and every client have them without
sending them, and clients of one architecture start alike.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from fedkd.models.base import BlockNet, block_of, build
from fedkd.models.mould import Mould, fill
from fedkd.rng import stream
from fedkd.types import Arrays, Task


class ModelBook:
    """Builds the networks of a federation by architecture label.

    Args:
        task: what is learned.
        specs: label -> (model name, options), for instance ``{"cnn": ("cnn", {})}``.
        seed: the run's seed; it addresses the initial weights.
        dtype: the type of all weights; their initial values are drawn in float32.
    """

    def __init__(
        self,
        task: Task,
        specs: Mapping[str, tuple[str, Mapping[str, Any]]],
        seed: int,
        dtype: torch.dtype = torch.float32,
    ):
        self.task, self.specs, self.seed, self.dtype = task, dict(specs), seed, dtype
        self._initial: dict[str, Arrays] = {}
        self._moulds: dict[str, Mould] = {}
        self._blocks: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()

    @property
    def labels(self) -> tuple[str, ...]:
        """The architecture labels, the first is the federation's own."""
        return tuple(self.specs)

    def initial(self, label: str) -> Arrays:
        """Return the initial weights of an architecture; shared, not to be changed."""
        with self._lock:
            self._mould(label)
            return self._initial[label]

    def make(self, label: str, *sources: Arrays, device: torch.device | str = "cpu") -> BlockNet:
        """Return a network with its initial weights overwritten by each source in turn.

        Keys of a source that the network does not have are ignored.

        Raises:
            ValueError: a source holds an array of another shape than the network's.
        """
        weights = initial = self.initial(label)
        for source in sources:
            # A source that has all there is stands for itself, whatever else it has.
            if source.keys() >= initial.keys():
                weights = source
            else:
                known = {key: value for key, value in source.items() if key in initial}
                weights = {**weights, **known}
        model = cast(BlockNet, self._moulds[label].cast(weights))
        return model if torch.device(device).type == "cpu" else model.to(device)

    def blocks(self, label: str) -> tuple[str, ...]:
        """Return the block names from shallow to deep, ``head`` last."""
        if label not in self._blocks:
            names = [block_of(key) for key in self.initial(label)]
            self._blocks[label] = tuple(dict.fromkeys(names))
        return self._blocks[label]

    def shapes(self, label: str) -> dict[str, tuple[int, ...]]:
        """Return the shape of every weight of an architecture."""
        return {key: value.shape for key, value in self.initial(label).items()}

    def _mould(self, label: str) -> Mould:
        """Return what networks are cast from: that is cheaper than building them."""
        if label not in self._moulds:
            name, options = self.specs[label]
            rng = stream(self.seed, "model", name)
            prototype = build(name, options, self.task, rng).to(self.dtype)
            self._initial[label] = to_arrays(prototype)
            self._moulds[label] = Mould(prototype)
        return self._moulds[label]


def to_arrays(module: torch.nn.Module) -> Arrays:
    """Return a copy of a module's parameters as arrays."""
    found: dict[str, torch.nn.Parameter] = {}
    _walk(module, "", found, set())
    return {key: _copied(parameter) for key, parameter in found.items()}


def load(module: torch.nn.Module, arrays: Arrays) -> None:
    """Copy arrays into the parameters of the same name; other parameters stay as they are.

    Raises:
        ValueError: an array has another shape than its parameter.
    """
    for key, parameter in module.named_parameters():
        if key in arrays:
            fill(parameter.detach(), key, arrays[key])


def _walk(
    module: torch.nn.Module, prefix: str, found: dict[str, torch.nn.Parameter], met: set[int]
) -> None:
    """Add what ``named_parameters`` yields of a module, which takes several times as long."""
    if id(module) in met:
        return
    met.add(id(module))
    for name, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in met:
            met.add(id(parameter))
            found[prefix + name] = parameter
    for name, child in module._modules.items():
        if child is not None:
            _walk(child, f"{prefix}{name}.", found, met)


def _copied(value: torch.Tensor) -> np.ndarray:
    value = value.detach()
    if value.is_cpu:
        return value.numpy().copy()
    return np.ascontiguousarray(value.cpu().numpy())
