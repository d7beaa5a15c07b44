"""Distillation on the server: an ensemble of frozen teachers, and the student that learns from it.

Where the inputs come from, a public pool or a generator, is the caller's; the student is trained
through the one loop, on soft targets that are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional

from fedkd.clients.agreeing import agreement
from fedkd.clients.chunk import rows_at_once
from fedkd.clients.guided import Guide
from fedkd.clients.guided import distil as taught_by
from fedkd.clients.heads import Weighted
from fedkd.clients.local import FitResult, Occasion, Term, fit
from fedkd.clients.training import Training
from fedkd.data.federated import UNLABELLED, Split
from fedkd.distill.fusion_rules import Fusion
from fedkd.distill.objectives.base import Objective, Temperature, divided
from fedkd.distill.targets import SampleTargets
from fedkd.errors import RunError
from fedkd.models.base import BlockNet
from fedkd.rng import Rng
from fedkd.types import Metrics


@contextmanager
def frozen(network: BlockNet) -> Iterator[BlockNet]:
    """Hold a network constant for a while: in evaluation mode, its parameters without gradient."""
    network.eval().requires_grad_(False)
    try:
        yield network
    finally:
        network.requires_grad_(True)


class Ensemble:
    """K frozen teachers and the rule that fuses them; gradient reaches inputs, never a teacher.

    ``shares`` (K, C) as in :func:`~fedkd.distill.fusion_rules.label_shares`. ``weights`` (K,) with
    mean 1 scale each teacher's logits before they are fused (1 for all: as if not given).
    """

    def __init__(
        self,
        teachers: Sequence[BlockNet],
        fusion: Fusion,
        shares: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        self.teachers = tuple(teachers)
        self.fusion, self.shares, self.weights = fusion, shares, weights
        for teacher in self.teachers:
            teacher.eval().requires_grad_(False)

    def logits(self, x: Tensor) -> Tensor:
        """Return every teacher's logits, (K, B, C); of text (K, B, L, V)."""
        return torch.stack([teacher(x) for teacher in self.teachers])

    def fuse(
        self, logits: Tensor, temperature: Temperature, labels: Tensor | None = None
    ) -> Tensor:
        """Return the fused probabilities (B, C) of teachers' logits (K, B, C)."""
        if logits.dim() == 4:
            rows = logits.shape[1:]
            if isinstance(temperature, Tensor):
                temperature = temperature.flatten()
            return self.fuse(logits.flatten(1, 2), temperature, labels).view(rows)
        if self.weights is not None:
            logits = logits * self.weights[:, None, None]
        return fused(self.fusion, logits, temperature, self.shares, labels)

    def probs(self, x: Tensor, temperature: Temperature, labels: Tensor | None = None) -> Tensor:
        """Return the fused probabilities (B, C) for inputs x, differentiable in x."""
        return self.fuse(self.logits(x), temperature, labels)

    def answers(self, x: Tensor) -> Tensor:
        """Return every teacher's logits (K, n, C) for many inputs, as constants, in chunks.

        To be kept where the same inputs are asked about again: ``4 K n C`` bytes.
        """
        with torch.inference_mode():
            found = [self.logits(part) for part in x.split(rows_at_once(x))]
        return torch.cat(found, dim=1)

    def each(self, x: Tensor, temperature: Temperature, answers: Tensor | None = None) -> Tensor:
        """Return the soft targets of every teacher by itself, (K, n, C), as constants.

        ``temperature`` and ``answers`` as in :meth:`targets`.
        """
        said = self.answers(x) if answers is None else answers
        if self.weights is not None:
            said = said * self.weights[:, None, None]
        at = temperature.expand(said.shape[:-1]) if isinstance(temperature, Tensor) else temperature
        return functional.softmax(divided(said, at), dim=-1).clone()

    def targets(
        self,
        x: Tensor,
        temperature: Temperature,
        labels: Tensor | None = None,
        answers: Tensor | None = None,
    ) -> Tensor:
        """Return soft targets (n, C) for many inputs, as constants, in chunks.

        ``temperature`` is one number, or (n,) of one for each input. ``answers`` (K, n, C) are what
        the teachers say of these inputs, where it is known already.
        """
        size = rows_at_once(x)
        parts = labels.split(size) if labels is not None else [None] * -(-len(x) // size)
        by_part: Sequence[Temperature] = [temperature] * len(parts)
        if isinstance(temperature, Tensor):
            by_part = temperature.split(size)
        with torch.inference_mode():
            said = map(self.logits, x.split(size)) if answers is None else answers.split(size, 1)
            found = [self.fuse(z, t, y) for z, t, y in zip(said, by_part, parts, strict=True)]
        # Outside, so that what learns from them can keep them for its gradients.
        return torch.cat(found)


def fused(
    rule: Fusion,
    logits: Tensor,
    temperature: Temperature,
    shares: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Return what ``rule`` makes of logits (K, B, C) at one temperature, or (B,) of one each."""
    if isinstance(temperature, Tensor):
        # Rules divide logits by T and by nothing else, so a column broadcasts as a number does.
        temperature = cast(float, temperature.to(logits.dtype).unsqueeze(-1))
    return rule(logits, temperature, shares, labels)


def transfer(
    student: BlockNet,
    x: Tensor,
    probs: Tensor,
    *,
    objective: Objective,
    temperature: Temperature,
    training: Training,
    rng: Rng,
    labels: Tensor | None = None,
    known: bool = False,
    guide: Guide | None = None,
    weights: Tensor | None = None,
    terms: Sequence[Term] = (),
    where: str = "strategy.server_lr",
    rescale: bool = True,
    measure: bool = False,
) -> FitResult:
    """Teach ``student`` in place: ``mean_i w_i T^2 D(p_i || softmax(f(x_i) / T))`` plus ``terms``.

    ``x`` (n, ...), ``probs`` (n, C) soft targets at ``temperature``, one number or (n,) of one for
    each example; ``weights`` (n,) of examples with mean 1 (none: 1 for all). Without ``rescale``
    the factor T^2 is left out. ``labels`` (n,) are for ``terms``, and for objectives that read them
    if they are ``known`` to be true, as those that an input was made for; (n, L) of text say where
    there is a token to learn. With ``measure`` the result says how student and targets agree.

    Raises:
        RunError: the loss is not finite; the message names the option ``where``.
    """
    y = labels if labels is not None else torch.zeros(len(x), dtype=torch.long, device=x.device)
    known = known and labels is not None
    counts = None
    if weights is not None and weights.dim() > 1:
        counts = weights / weights[y != UNLABELLED].mean()
    distil: Term = taught_by(
        objective,
        SampleTargets(probs),
        temperature,
        1.0,
        guide=guide,
        rescale=rescale,
        counts=counts,
        labelled=known,
    )
    if weights is not None and counts is None:
        distil = Weighted(distil, weights)
    try:
        data = Split(x, y)
        on = Occasion(student, data, training.lr, rng)
        ready = [term for given in (distil, *terms) for term in given.placed(on)]
        result = fit(student, data, ready, training, training.lr, rng)
    except RunError:
        raise RunError(
            f"distillation on the server diverged; lower {where} (now {training.lr:.4g})"
        ) from None
    if not measure:
        return result
    return replace(result, agreement=agreement(student, Split(x, y), [distil]))


def agreed(result: FitResult, label: str) -> Metrics:
    """Name what was measured of a student: ``server/agreement/top1/<label>`` and so on."""
    return {f"server/{name}/{label}": value for name, value in result.agreement.items()}
