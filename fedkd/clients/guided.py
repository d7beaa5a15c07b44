"""Distillation whose targets are changed batch by batch: an objective under target policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedkd.clients.bilevel import Unrolled
from fedkd.clients.client import Client
from fedkd.clients.dp_sgd import steps_of
from fedkd.clients.local import Batch, Occasion, Term
from fedkd.clients.terms import Distil
from fedkd.clients.training import Training
from fedkd.distill.chosen import ChosenPolicy, chosen_policy
from fedkd.distill.objectives.base import Objective, Temperature
from fedkd.distill.policies.base import Need, TargetPolicy, Taught
from fedkd.distill.targets import Targets
from fedkd.errors import ConfigError
from fedkd.types import Arrays, DpClass, prefixed, select


@dataclass(eq=False)
class Guide:
    """The policies of one fit, in order, and where in the run it lies.

    ``begin`` and ``end`` are shares of the run, from 0 to 1; ``steps`` is how many steps the fit
    has, or several that go on from each other, ``step`` how many of them are done: each call of
    ``loss`` is one, unless :meth:`begins` tells where one begins, as in a private fit, which asks
    for the losses of one step in parts, or not at all. ``place`` is where in a client's memory the
    policies keep what they learned. ``teachers`` (K, n, C) are the soft targets of each of several
    teachers for all n examples that are taught, where a policy needs them.
    """

    policies: tuple[TargetPolicy, ...]
    begin: float
    end: float
    steps: int
    place: str = "policies"
    step: int = 0
    by_call: bool = True
    teachers: Tensor | None = None
    ready: bool = field(default=False, init=False, repr=False)
    rows: Tensor | None = field(default=None, init=False, repr=False)
    index: Tensor | None = field(default=None, init=False, repr=False)
    unrolled: Unrolled | None = field(default=None, init=False, repr=False)

    @property
    def dp(self) -> DpClass:
        """What the policies make of a term that teaches one example by itself."""
        mixing = any(policy.dp == "batch-coupled" for policy in self.policies)
        return "batch-coupled" if mixing else "per-example"

    @property
    def needs(self) -> frozenset[Need]:
        """What its policies cannot do without."""
        return frozenset().union(*(policy.needs for policy in self.policies))

    @property
    def progress(self) -> float:
        """How much of the run is over, from 0 to 1."""
        done = min(1.0, self.step / self.steps) if self.steps else 1.0
        return self.begin + (self.end - self.begin) * done

    def begins(self) -> None:
        """Take note that a step begins, whatever is asked in it: calls are no longer counted."""
        if not self.by_call:
            self.step += 1
        self.by_call = False

    def loss(
        self,
        objective: Objective,
        logits: Tensor,
        probs: Tensor,
        temperature: Temperature,
        labels: Tensor | None,
        scaled: Callable[[Tensor, Temperature], Tensor] | None = None,
        told: bool = True,
    ) -> Tensor:
        """Return the losses (B,) of rows by an objective, as the policies would have them taught.

        ``w_i T_i^2 D(p_i || softmax(z_i / T_i))`` with p, T and w what the policies make of what is
        given, each of what the one before it left: logits z (B, C), probabilities (B, C) at one T
        or (B,), labels (B,) or none, which an objective is told as well if it wants them, where
        ``told``. ``scaled`` makes of what the objective said, and of T, what is weighted. Without
        policies it is what the objective says.
        """
        given = Taught(logits, probs, temperature, None, labels, self.progress, self._asked())

        def said(taught: Taught) -> tuple[Taught, Tensor]:
            for policy in self.policies:
                taught = policy(taught)
            known = labels if told and objective.labels else None
            found = objective(taught.logits, taught.probs, taught.temperature, known)
            return taught, found if scaled is None else scaled(found, taught.temperature)

        if self.unrolled is not None:
            self._learn(given, said)
        if self.by_call:
            self.step += 1
        taught, found = said(given)
        for policy in self.policies:
            policy.seen(found.detach())
        if taught.weights is not None:
            found = found * taught.weights
        for policy in self.policies:
            more = policy.penalty(taught)
            found = found if more is None else found + more
        return found

    def _asked(self) -> Tensor | None:
        """Return the teachers' soft targets (K, B, C) of the rows that are asked about."""
        if self.teachers is None or self.index is None:
            return None
        found = self.teachers[:, self.index].flatten(1, -2)
        return found if self.rows is None else found[:, self.rows]

    def _learn(self, given: Taught, said: Callable[[Taught], tuple[Taught, Tensor]]) -> None:
        """Let policies learn from validation examples by the gradient through one step."""
        if self.unrolled is None or self.index is None:
            return
        with torch.enable_grad():
            z = given.logits.detach().requires_grad_()
            taught, losses = said(replace(given, logits=z))
            losses = losses if taught.weights is None else losses * taught.weights
            (r,) = torch.autograd.grad(losses.mean(), z, create_graph=True)
            full = r.detach()
            if self.rows is not None:
                full = r.new_zeros(len(self.rows), r.shape[1])
                full[self.rows] = r.detach()
            slopes = self.unrolled.slopes(self.index, full)
            slopes = slopes if self.rows is None else slopes[self.rows]
            outcome = (slopes * r).sum()
            for policy in self.policies:
                if "validation" in policy.needs:
                    own = [p for module in policy.modules() for p in module.parameters()]
                    policy.learn(torch.autograd.grad(outcome, own, retain_graph=True))

    def placed(self, occasion: Occasion) -> None:
        """Get ready for a fit: policies learn how many classes and teachers there are.

        Raises:
            ConfigError: a policy needs what is not there.
        """
        teachers = 0 if self.teachers is None else len(self.teachers)
        needs = self.needs
        if ("teachers" in needs and not teachers) or (
            "validation" in needs and occasion.validation is None
        ):
            raise ConfigError(
                f"a target policy needs {' and '.join(sorted(needs))}, which there are not where "
                "it is used; leave it out of strategy.policies"
            )
        for i, policy in enumerate(self.policies if not self.ready else ()):
            policy.sized(occasion.sizes[""], teachers, occasion.rng.child("policy", i))
            for module in policy.modules():
                module.to(occasion.device)
        self.ready = True
        if "validation" in needs and occasion.validation is not None:
            held = occasion.validation()
            self.unrolled = Unrolled(occasion, held) if len(held) else None

    def asks(self, batch: Batch, rows: Tensor | None) -> None:
        """Take note of which examples are asked about: a batch, or the ``rows`` (B,) of it."""
        self.index, self.rows = batch.index, rows

    def modules(self) -> tuple[nn.Module, ...]:
        """Return what of the policies is trained along with the student."""
        along = [policy for policy in self.policies if "validation" not in policy.needs]
        return tuple(module for policy in along for module in policy.modules())

    def keep(self, state: Arrays) -> None:
        """Write what the policies learned into a memory."""
        for i, policy in enumerate(self.policies):
            state.update(prefixed(f"{self.place}/{i}", policy.arrays()))


def guide(
    named: Sequence[ChosenPolicy] | None,
    round_: int,
    rounds: int,
    steps: int,
    state: Arrays | None = None,
    place: str = "policies",
    device: torch.device | str = "cpu",
) -> Guide | None:
    """Return the guide of a fit in a round, which goes on from ``state``; None without policies.

    ``device`` is where the student is, and what of the policies is trained along with it.

    Raises:
        ConfigError: there is no policy of a name, or an option of it is wrong.
    """
    if not named:
        return None
    made = tuple(chosen_policy(name) for name in named)
    kept = select(state or {}, place)
    for i, policy in enumerate(made):
        policy.remember(select(kept, str(i)))
        for module in policy.modules():
            module.to(device)
    return Guide(made, (round_ - 1) / rounds, round_ / rounds, steps, place)


def guide_of(
    named: Sequence[ChosenPolicy] | None,
    client: Client,
    training: Training | None = None,
    examples: int | None = None,
    place: str = "policies",
) -> Guide | None:
    """Return the guide of a client's fit, on its own training data where nothing else is said."""
    n = len(client.data.train) if examples is None else examples
    steps = steps_of(training or client.training, n) if n else 0
    return guide(named, client.round, client.rounds, steps, client.state, place, client.device)


class Led(Term):
    """A term that a guide may lead: what it trains along, what it keeps, where its steps begin.

    Without a guide it is the term that it was. With one it is never merged with those of other
    clients, since each client's policies have a state of their own: see :func:`led`.
    """

    guide: Guide | None = None

    def led_by(self, guide: Guide | None) -> None:
        """Go by ``guide`` from now on: where it mixes examples, so does a term of examples."""
        self.guide = guide
        if guide is not None and guide.dp == "batch-coupled" and self.dp == "per-example":
            self.dp = "batch-coupled"

    def taught(
        self,
        objective: Objective,
        logits: Tensor,
        probs: Tensor,
        temperature: Temperature,
        labels: Tensor | None,
    ) -> Tensor:
        """Return the losses (B,) of rows by an objective, under the guide if there is one."""
        if self.guide is not None:
            return self.guide.loss(objective, logits, probs, temperature, labels)
        return objective(logits, probs, temperature, labels if objective.labels else None)

    def placed(self, occasion: Occasion) -> Sequence[Term]:
        if self.guide is not None:
            self.guide.placed(occasion)
        return super().placed(occasion)

    def modules(self) -> Sequence[nn.Module]:
        own = super().modules()
        return own if self.guide is None else (*own, *self.guide.modules())

    def keep(self, state: Arrays) -> None:
        super().keep(state)
        if self.guide is not None:
            self.guide.keep(state)

    def begins(self) -> None:
        """Take note that a step begins, which may ask for the losses in parts, or not at all."""
        if self.guide is not None:
            self.guide.begins()


def led(terms: Sequence[Term]) -> bool:
    """Return whether a guide leads one of them, so that they cannot be merged."""
    return any(isinstance(term, Led) and term.guide is not None for term in terms)


class Guided(Led, Distil):
    """:class:`~fedkd.clients.terms.Distil` whose targets, temperatures and weights go by policies.

    The loss of an example is that of :meth:`Guide.loss`. Without policies it is
    :class:`~fedkd.clients.terms.Distil`.
    """

    guide: Guide

    def __init__(
        self,
        objective: Objective,
        targets: Targets,
        temperature: Temperature,
        weight: float,
        *,
        guide: Guide,
        **more: Any,
    ) -> None:
        super().__init__(objective, targets, temperature, weight, **more)
        self.led_by(guide)

    def __call__(self, batch: Batch) -> Tensor:
        if self.guide.needs:
            self.guide.asks(batch, None)
        return super().__call__(batch)

    def _among(
        self, logits: Tensor, probs: Tensor, temperature: Temperature, y: Tensor, real: Tensor
    ) -> Tensor:
        self.guide.rows = real
        return super()._among(logits, probs, temperature, y, real)

    def loss(
        self, logits: Tensor, probs: Tensor, temperature: Temperature, labels: Tensor | None
    ) -> Tensor:
        return self.guide.loss(self.objective, logits, probs, temperature, labels, self.scaled)

    @classmethod
    def merged(cls, terms: Any, data: Any) -> None:
        """Return None: each client's policies have a state of their own."""
        return


def distil(
    objective: Objective,
    targets: Targets,
    temperature: Temperature,
    weight: float,
    *,
    guide: Guide | None = None,
    **more: Any,
) -> Distil:
    """Return the term that teaches by an objective, under the policies of a guide if there is one.

    ``more`` is what :class:`~fedkd.clients.terms.Distil` takes besides.
    """
    if guide is None:
        return Distil(objective, targets, temperature, weight, **more)
    return Guided(objective, targets, temperature, weight, guide=guide, **more)
