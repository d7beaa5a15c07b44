"""Soft targets: what a student is taught, by class or by example, with absences masked.

Also how they are made hotter or noisier item by item, on plain tensors: who asks for it, and why,
is no business of distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.distill.objectives.base import divided
from fedkd.distill.simplex import project
from fedkd.rng import Rng


class Targets(Protocol):
    """Gives the soft targets of a batch: probabilities (B, C) and a mask (B,) of who has one."""

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the targets of examples with labels ``y`` at positions ``index``."""


@dataclass(frozen=True)
class ClassTargets:
    """One soft target for each class: an example is taught the target of its label.

    ``probs`` (C, C): row c is the target of class c; ``mask`` (C,): False where nobody could say.
    """

    probs: Tensor
    mask: Tensor

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.probs[y], self.mask[y]


@dataclass(frozen=True)
class SampleTargets:
    """One soft target for each training example, ``probs`` (n, C)."""

    probs: Tensor

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.probs[index], torch.ones_like(y, dtype=torch.bool)


@dataclass(frozen=True)
class MaskedTargets:
    """One soft target for some training examples: ``probs`` (n, C) where ``mask`` (n,) is true."""

    probs: Tensor
    mask: Tensor

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.probs[index], self.mask[index]


@dataclass(frozen=True)
class TabledTargets:
    """For each training example a row of a table: ``rows`` (n,) of ``probs`` (R, C), ``mask`` (R,).

    What the :class:`ClassTargets` of several clients are together: no row is kept twice.
    """

    probs: Tensor
    mask: Tensor
    rows: Tensor

    def __call__(self, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        at = self.rows[index]
        return self.probs[at], self.mask[at]


def joined(targets: Sequence[Targets], labels: Sequence[Tensor]) -> Targets | None:
    """Return the targets of several clients' examples as one, in the order given; None: cannot.

    ``labels`` are those of each client's examples; ``index`` then counts through the union. Only
    the types of this module are known, and only if all are of the same one and of one shape.
    """
    samples = [t for t in targets if type(t) is SampleTargets]
    masked = [t for t in targets if type(t) is MaskedTargets]
    classes = [t for t in targets if type(t) is ClassTargets]
    known: list[SampleTargets | MaskedTargets | ClassTargets] = [*samples, *masked, *classes]
    found = [t.probs for t in known]
    if len({(p.shape[1:], p.dtype, p.device) for p in found}) != 1:
        return None
    if len(samples) == len(targets):
        return SampleTargets(torch.cat(found))
    if len(masked) == len(targets):
        return MaskedTargets(torch.cat(found), torch.cat([t.mask for t in masked]))
    if len(classes) < len(targets) or len({len(p) for p in found}) != 1:
        return None
    places = torch.arange(sum(map(len, found)), device=found[0].device).split(len(found[0]))
    rows = torch.cat([own[y] for own, y in zip(places, labels, strict=True)])
    return TabledTargets(torch.cat(found), torch.cat([t.mask for t in classes]), rows)


def softened(probs: Tensor, temperature: Tensor) -> Tensor:
    """Return probabilities (..., C) at temperature 1 as they are at T, one for each row (...,).

    ``softmax(log p / T)``; where T = 1 the row stays as it is, to the last bit.
    """
    flat = functional.softmax(divided(_log(probs), temperature), dim=-1)
    return torch.where((temperature == 1).unsqueeze(-1), probs, flat)


def bounded(logits: Tensor, clip: float) -> Tensor:
    """Return ``clip(z - mean(z), -C, C)`` of logits (..., K), which bounds their sensitivity."""
    return (logits - logits.mean(-1, keepdim=True)).clamp(-clip, clip)


def disturbed(logits: Tensor, temperatures: Tensor, clip: float, noise: Tensor, rng: Rng) -> Tensor:
    """Return ``softmax(bounded(z) / T) + N(0, sigma^2)``, (..., K): not yet distributions.

    ``logits`` (..., K); ``temperatures`` and ``noise`` (...,): T and sigma of each row. Clipping
    goes first, since sigma means something only in terms of what a target can be.
    """
    clean = functional.softmax(divided(bounded(logits, clip), temperatures), dim=-1)
    drawn = torch.randn(clean.shape, generator=rng.torch(), dtype=clean.dtype).to(clean.device)
    return clean + drawn * noise.to(clean).unsqueeze(-1)


def noised(logits: Tensor, temperatures: Tensor, clip: float, noise: Tensor, rng: Rng) -> Tensor:
    """Return soft targets (..., K) with noise: :func:`disturbed`, projected onto the simplex.

    Rows whose ``noise`` is 0 are ``softmax(z / T)`` as it is, neither clipped nor projected.
    """
    plain = functional.softmax(divided(logits, temperatures), dim=-1)
    if not bool((noise > 0).any()):
        return plain
    rough = project(disturbed(logits, temperatures, clip, noise, rng))
    return torch.where((noise > 0).to(plain.device).unsqueeze(-1), rough, plain)


def noised_probs(
    probs: Tensor, temperatures: Tensor, clip: float, noise: Tensor, rng: Rng
) -> Tensor:
    """Return :func:`noised` of soft targets (..., K) that are probabilities at T, however fused.

    Their logits are ``T log p``: clipped like any, so that every rule of fusion is bounded alike.
    """
    if not bool((noise > 0).any()):
        return probs
    logits = _log(probs) * temperatures.to(probs.dtype).unsqueeze(-1)
    rough = project(disturbed(logits, temperatures, clip, noise, rng))
    return torch.where((noise > 0).to(probs.device).unsqueeze(-1), rough, probs)


def _log(probs: Tensor) -> Tensor:
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
