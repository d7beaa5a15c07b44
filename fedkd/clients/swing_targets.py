"""What clients and servers do under swing distillation: own temperature and noise for every item.

Temperatures and noise come as plain tensors: what makes an item private is decided elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import divided
from fedkd.distill.targets import noised, noised_probs, softened
from fedkd.errors import RunError
from fedkd.rng import Rng


@dataclass(frozen=True, eq=False)
class SwingTargets:
    """How targets are made under swing distillation, beside their temperatures.

    ``noise`` (n,): standard deviation of the noise on each class of an item's target, for a client
    on its own training examples, for the server on the public pool; None adds none. ``clip``:
    centred logits are clipped to [-C, C] where there is noise. ``rescale``: the loss of an item
    keeps its factor T^2. ``weights`` (n,): what an item's distillation counts; None: all the same.
    """

    noise: Tensor | None = None
    clip: float = 5.0
    rescale: bool = True
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Softening:
    """Temperatures, noise, weights (n,) and options of the items at hand, by :func:`softening`."""

    temperatures: Tensor
    noise: Tensor | None
    clip: float
    rescale: bool
    weights: Tensor | None = None

    def of_logits(self, logits: Tensor, rng: Rng) -> Tensor:
        """Return the targets (n, C) of teacher logits (n, C), as constants."""
        z, t = logits.detach(), self.temperatures
        if self.noise is None:
            return functional.softmax(divided(z, t), dim=-1)
        return noised(z, t, self.clip, self.noise, rng)

    def of_probs(self, probs: Tensor, rng: Rng) -> Tensor:
        """Return the targets (n, C) of fused probabilities (n, C) at T, as constants."""
        if self.noise is None:
            return probs.detach()
        return noised_probs(probs.detach(), self.temperatures, self.clip, self.noise, rng)

    def soften(self, probs: Tensor) -> Tensor:
        """Return probabilities (n, C) at temperature 1 as they are at T."""
        return softened(probs, self.temperatures)


def softening(
    swing: object | None,
    temperatures: Tensor | None,
    index: Tensor | None = None,
    *,
    noise: bool = True,
    device: torch.device | str = "cpu",
) -> Softening | None:
    """Return how the targets of the items at ``index`` (None: of all) are made; None: as usual.

    ``swing`` is a :class:`SwingTargets`, ``temperatures`` (n,) those of all items. Without
    ``noise`` only temperatures are of interest: somebody else has made the targets.

    Raises:
        RunError: there is one of the two only.
    """
    if swing is None:
        return None
    if not isinstance(swing, SwingTargets) or temperatures is None:
        raise RunError(
            "swing distillation needs SwingTargets and a temperature for every item; got "
            f"{type(swing).__name__} and {'no' if temperatures is None else 'some'} temperatures"
        )

    def chosen(values: Tensor) -> Tensor:
        return (values if index is None else values[index.to(values.device)]).to(device)

    std = chosen(swing.noise) if noise and swing.noise is not None else None
    weights = None if swing.weights is None else chosen(swing.weights).float()
    return Softening(chosen(temperatures), std, swing.clip, swing.rescale, weights)
