"""Swing distillation: the more private an item may be, the hotter and noisier its soft target.

A reconstruction from the abstract of Li et al., Swing Distillation: A Privacy-Preserving Knowledge
Distillation Framework, arXiv:2212.08349; the body could not be read, so every formula is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedkd.data.federated import Split
from fedkd.distill.targets import noised
from fedkd.errors import ConfigError, DataError
from fedkd.options import build
from fedkd.privacy.options import Release, Swing
from fedkd.privacy.scorers.base import ExampleScorer, Scorer, TokenScorer, scorers
from fedkd.privacy.sensitivity import diameter
from fedkd.privacy.token_swing import TokenScores, predicted
from fedkd.rng import Rng
from fedkd.types import Task


def likelihood(
    scores: Tensor, mask: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """Return how likely items are private, p in [0, 1], from ranks of their scores, any shape.

    ``p_i = (share of the others below u_i) + (share of the others equal to u_i) / 2``: 0 for the
    smallest, 1 for the largest, ties in the middle of their ranks; a single item gets 0, equal
    scores 1/2. With ``reference`` scores (m,) the others are those, so that p_i depends on item i
    and on public data alone. Where ``mask`` is true p = 1; it takes its rank all the same.

    Raises:
        DataError: a score is not finite.

    >>> likelihood(torch.tensor([3.0, 1.0, 2.0, 2.0])).tolist()
    [1.0, 0.0, 0.5, 0.5]
    """
    if not bool(torch.isfinite(scores).all()):
        raise DataError(
            "a privacy score is not finite, so nobody knows how private its item is; check the "
            "inputs for values that are not finite, or use another privacy.swing.scorer"
        )
    own = scores.detach().cpu().double().flatten().numpy()
    others = own if reference is None else reference.detach().cpu().double().flatten().numpy()
    if reference is not None and not np.isfinite(others).all():
        raise DataError("a reference score is not finite; check the inputs of the public pool")
    ordered = np.sort(others)
    below = np.searchsorted(ordered, own, side="left")
    equal = np.searchsorted(ordered, own, side="right") - below
    itself = int(reference is None)
    p = (below + (equal - itself) / 2) / max(len(others) - itself, 1)
    found = torch.from_numpy(p).reshape(scores.shape)
    return found if mask is None else torch.where(mask.cpu(), torch.ones_like(found), found)


def temperatures(p: Tensor, swing: Swing) -> Tensor:
    """Return the temperature of every item, float64, in the shape of p.

    ``adaptive``: ``T = T_min + (T_max - T_min) p^gamma``, private items hotter; ``reverse``:
    ``T_max - (T_max - T_min) p^gamma``, an ablation; ``constant``: T_max, whatever p is.

    Raises:
        ConfigError: the range is upside down, or swing distillation is off.
    """
    if swing.t_min > swing.t_max:
        raise ConfigError(
            f"privacy.swing.t_min = {swing.t_min} is above t_max = {swing.t_max}; allowed is t_min "
            "<= t_max; set map = 'reverse' for private items to be colder"
        )
    if swing.map == "off":
        raise ConfigError("privacy.swing.map = 'off' has no temperatures; set map = 'adaptive'")
    if swing.map == "constant":
        return torch.full_like(p, swing.t_max, dtype=torch.float64)
    rise = (swing.t_max - swing.t_min) * p.double().pow(swing.gamma)
    return swing.t_min + rise if swing.map == "adaptive" else swing.t_max - rise


def deviations(
    temperatures: Tensor, swing: Swing, classes: int, clip: float, public: bool = True
) -> Tensor:
    """Return the noise on every item's target: ``sigma_i = noise * Delta(K, C, T_i)``, float64.

    Delta is the L2 diameter of what a target of K classes can be at T with centred logits clipped
    to [-C, C]. Where temperatures are not ``public`` they themselves say something of private data:
    then every item gets the largest, that of the coldest T that there can be.
    """
    if not swing.noise:
        return torch.zeros_like(temperatures, dtype=torch.float64)
    if not public and swing.map != "constant":
        temperatures = torch.full_like(temperatures, swing.t_min)
    found = diameter(classes, clip, temperatures.detach().cpu().double().numpy())
    return swing.noise * torch.from_numpy(found)


def targets(
    logits: Tensor,
    temperatures: Tensor,
    swing: Swing,
    clip: float,
    rng: Rng,
    public: bool = True,
) -> Tensor:
    """Return the soft targets of teacher logits (..., K) at temperatures (...,), with their noise.

    ``softmax(z / T_i)``; with noise ``project(softmax(clip(z - mean z, -C, C) / T_i) + N(0,
    sigma_i^2 I))``, projected onto the simplex in L2. Images (N, K) with T (N,), tokens (N, L, K)
    with T (N, L).
    """
    std = deviations(temperatures, swing, logits.shape[-1], clip, public)
    return noised(logits, temperatures, clip, std, rng)


class Items(NamedTuple):
    """T (n,) and sigma (n,), float64, and where not all count alike the loss weights (n,).

    Of text (n, L): those of the token that is predicted at each place.
    """

    temperatures: Tensor
    noise: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class SwingPlan:
    """Temperatures and noise of a run's items, by one scorer; the pool is scored once.

    ``scorer`` stands in for ``swing.scorer``, where it has options of its own.
    """

    swing: Swing
    release: Release
    pool: Split | None
    task: Task
    rng: Rng
    scorer: Scorer | None = None

    def of_pool(self) -> Items:
        """Return temperatures, noise and weights of the public pool.

        Raises:
            ConfigError: there is no pool, or the scorer cannot score it.
        """
        pool = self._pool("scores its examples")
        if self.swing.map == "constant":
            return self._constant(pool)
        return self._made(pool, self._scores, public=not self._scorer.private)

    def of_data(self, data: Split) -> Items:
        """Return the same of examples that are not public, such as a client's own.

        Their temperatures are ranks among the scores of the pool, so that T_i depends on example i
        and on public data alone. It does depend on a private example, though: noise is that of the
        coldest T.

        Raises:
            ConfigError: there is no pool, or the scorer cannot score the data.
        """
        if self.swing.map == "constant":
            return self._constant(data)
        pool, scorer = self._pool("compares clients' own examples with it"), self._scorer
        reference = self._scores[self._there(pool)]
        if isinstance(scorer, ExampleScorer):
            return self._made(data, scorer.score(data, pool, self.task, self.rng), reference)
        return self._made(data, self._places.of(data), reference)

    def _there(self, data: Split) -> Tensor:
        """Return which items there are: all examples, or the places of text (n, L) with a token."""
        return predicted(data) if self.task.sequence else torch.ones(len(data), dtype=torch.bool)

    def _constant(self, data: Split) -> Items:
        p = torch.zeros(self._there(data).shape)
        return self._items(p, temperatures(p, self.swing), public=True)

    def _made(
        self, data: Split, scores: Tensor, reference: Tensor | None = None, public: bool = False
    ) -> Items:
        there, p = self._there(data), scores
        if self._scorer.ranked:
            p = torch.zeros_like(scores, dtype=torch.float64)
            p[there] = likelihood(scores[there], reference=reference)
        # Behind the end of a text nothing is taught, and nothing is to be hidden.
        t = temperatures(p, self.swing).where(there, self.swing.t_min)
        return self._items(p, t, public)

    def _items(self, p: Tensor, t: Tensor, public: bool) -> Items:
        clip = self.release.logit_clip
        noise = deviations(t, self.swing, self.task.classes, clip, public)
        return Items(t, noise, 1.0 - p.double() if self.swing.weights == "open" else None)

    def _pool(self, does: str) -> Split:
        if self.pool is None or len(self.pool) == 0:
            raise ConfigError(
                f"privacy.swing.map = {self.swing.map!r} needs a public pool, since its scorer "
                f"{does}; set data.public.size = 500, or privacy.swing.map = 'constant'"
            )
        return self.pool

    @cached_property
    def _scorer(self) -> ExampleScorer | TokenScorer:
        scorer = self.scorer or build(
            scorers.get(self.swing.scorer),
            self.swing.scorer_options,
            "privacy.swing.scorer_options",
        )
        task, wanted = self.task, TokenScorer if self.task.sequence else ExampleScorer
        if not (isinstance(scorer, ExampleScorer | TokenScorer) and isinstance(scorer, wanted)):
            does = (
                f"scores whole examples, but {task.name!r} is text, where every token has its own "
                "temperature"
                if task.sequence
                else f"scores tokens of text, but an input of {task.name!r} has shape "
                f"{task.input_shape}"
            )
            able = ", ".join(n for n in scorers.names() if issubclass(scorers.get(n), wanted))
            raise ConfigError(
                f"privacy.swing.scorer = {self.swing.scorer!r} {does}; allowed are {able}"
            )
        return scorer

    @cached_property
    def _scores(self) -> Tensor:
        pool, scorer = self._pool("scores its examples"), self._scorer
        if isinstance(scorer, ExampleScorer):
            return scorer.score_public(pool, self.task, self.rng)
        return self._places.of_pool

    @cached_property
    def _places(self) -> TokenScores:
        assert isinstance(self._scorer, TokenScorer)
        return TokenScores(self._scorer, self._pool("scores its tokens"), self.task, self.rng)


def prepare_swing(
    swing: Swing,
    release: Release,
    pool: Split | None,
    data: Split | None,
    task: Task,
    rng: Rng,
    scorer: Scorer | None = None,
) -> Items:
    """Return what swing distillation needs of ``data``, or of the public pool where it is None.

    One call of :class:`SwingPlan`, which scores the pool once for many clients.

    Raises:
        ConfigError: swing distillation is off, or cannot be done with this pool and scorer.
        DataError: a score is not finite.
    """
    plan = SwingPlan(swing, release, pool, task, rng, scorer)
    return plan.of_pool() if data is None else plan.of_data(data)


def statement(swing: Swing) -> str:
    """Say what swing distillation guarantees by itself: nothing that has an epsilon."""
    if swing.map == "off":
        return "swing distillation: off"
    at = (
        f"T = {swing.t_max:g}"
        if swing.map == "constant"
        else f"T {swing.t_min:g} to {swing.t_max:g}"
    )
    judged = "" if swing.map == "constant" else f", scorer {swing.scorer}"
    noise = (
        f"its noise ({swing.noise:g} times the sensitivity of a target) is not accounted for"
        if swing.noise
        else "no noise is added, and a temperature scales what a target says without bounding it"
    )
    return (
        f"swing distillation ({swing.map}, {at}{judged}; a reconstruction): no epsilon: the "
        f"temperature is a heuristic; {noise}"
    )
